"""Small data sets on disk and a stand-in tokenizer, for the tests of the sources."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from echo4o.data.sources import Limits, SourceContext, build_sources
from echo4o.data.tokenizer import SpecialTokens

VAE = {"image_stride": 16, "max_image_size": 96, "min_image_size": 32}
VIT = {"image_stride": 14, "max_image_size": 84, "min_image_size": 28}


class CharTokenizer:
    """One token a character, so that ids can be read back."""

    def encode(self, text):
        return [ord(char) for char in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def __len__(self):
        return 1 << 16


def encoded(width=40, height=30, value=0, format="PNG", mode="RGB", **options):
    """Bytes of a one-coloured image."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height), value if mode == "L" else (value,) * len(mode)).save(buffer, format, **options)
    return buffer.getvalue()


def write_parquet(path, rows, row_group_size=None, schema=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)


def write_jsonl(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def context(base_dir, **changes):
    limits = Limits(**{"max_latent_size": 8, "vit_max_num_patch_per_side": 8, **changes.pop("limits", {})})
    values = {"data_seed": 42, **changes}
    return SourceContext(CharTokenizer(), SpecialTokens(1, 2, 3, 4), base_dir=base_dir, limits=limits, **values)


def build_group(base_dir, kind, entry, *, settings=None, **context_changes):
    """The one group of a config with one data set called ``data``."""
    group = {
        "dataset_names": ["data"],
        "weight": 1,
        "image_transform_args": VIT if kind == "vlm_sft" else VAE,
        **({} if kind in ("t2i_pretrain", "vlm_sft") else {"vit_image_transform_args": VIT}),
        **(settings or {}),
    }
    config = {kind: group, "dataset_info": {kind: {"data": entry}}}
    (built,) = build_sources(config, context(base_dir, **context_changes))
    return built


def all_plans(source, epoch=0):
    """Plans of an epoch, by row."""
    plans = [source.plan(epoch, position) for position in range(len(source))]
    return sorted(plans, key=lambda plan: plan.address.index)


def shape_of(sample):
    """Readable form of a sample: (kind, text or brightness of the image, loss, droppable)."""
    rows = []
    for segment in sample.segments:
        if segment.kind == "text":
            content = CharTokenizer().decode(segment.text_ids)
        else:
            content = round((float(segment.image.mean()) * 0.5 + 0.5) * 255)
        rows.append((segment.kind, content, segment.loss, segment.droppable))
    return rows


def count_tokens(sample):
    """Packed length as the packer lays it down."""
    total = 0
    for segment in sample.segments:
        if segment.kind == "text":
            total += len(segment.text_ids) + 2
        else:
            patch = 16 if segment.kind == "vae_image" else 14
            total += (segment.image.shape[1] // patch) * (segment.image.shape[2] // patch) + 2
    return total


def random_picture(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
