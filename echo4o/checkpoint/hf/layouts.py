"""Which files an exported folder has, and which tensor lies in which."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.remote_code import ARCHITECTURE, AUTO_MAP, remote_files
from echo4o.checkpoint.shared_file import FileLayout, plan_file
from echo4o.checkpoint.weights import write_text
from echo4o.model import BagelConfig
from echo4o.model.vae import WEIGHTS_FILE

#: ``bagel``: one file under upstream's name. ``hf``: shards and remote code. ``both``: upstream's file, which an index
#: names to transformers. ``adapter``: LoRA alone, in peft's format.
LAYOUTS = ("both", "bagel", "hf", "adapter")
DTYPES = ("bfloat16", "float32", "float16", "auto")
SINGLE_FILE = "ema.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class WeightsPlan:
    """Files with weights.

    Attributes:
        files: name → names of the tensors in it, in their order.
        layouts: name → where each tensor lies.
        index: content of ``model.safetensors.index.json``, or None where none is needed.
    """

    files: Mapping[str, Sequence[str]]
    layouts: Mapping[str, FileLayout]
    index: str | None

    @property
    def num_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self.layouts.values())


def plan_weights(
    tensors: Tensors, layout: str, max_shard_size: str = DEFAULT_SHARD_SIZE, vae: Mapping[str, int] | None = None
) -> WeightsPlan:
    """Distribute tensors (dtype, shape) over files.

    Args:
        vae: name → bytes of the VAE's tensors, which the index of ``both`` names as the published one does.

    Raises:
        CheckpointError: if `max_shard_size` is no size.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    if layout == "hf":
        shards = _shards(sizes, parse_size(max_shard_size))
        count = len(shards)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        files = dict(zip(names if count > 1 else ["model.safetensors"], shards, strict=True))
    else:
        files = {SINGLE_FILE: list(tensors)}
    layouts = {file: plan_file({name: tensors[name] for name in names}) for file, names in files.items()}
    if layout != "both" and len(files) == 1:
        return WeightsPlan(files, layouts, None)
    listed = files | ({WEIGHTS_FILE: list(vae)} if vae and layout == "both" else {})
    return WeightsPlan(files, layouts, _index(listed, sum(sizes.values()) + sum((vae or {}).values())))


def parse_size(text: str) -> int:
    """``5GB`` → 5,000,000,000; units KB, MB, GB (powers of 1000) and KiB, MiB, GiB.

    Raises:
        CheckpointError: for anything else, and for 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    unit = match and (match[2] if match[2].endswith("B") or not match[2] else f"{match[2]}B")
    size = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size <= 0:
        raise CheckpointError(f"--max-shard-size {text!r} is no size; write for example 5GB or 500MB")
    return size


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _index(files: Mapping[str, Sequence[str]], total_size: int) -> str:
    weight_map = {name: file for file, names in files.items() for name in names}
    return json.dumps(
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )


def preprocessor_config(config: BagelConfig) -> dict[str, Any]:
    """Of SigLIP's image processor: serving engines ask for the file. Size in pixels."""
    side = config.vit.image_size if config.vit else 0
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_configs(folder: Path, config: BagelConfig, layout: str, dtype: str, generation: Mapping[str, Any]) -> None:
    """Write every config of a folder and, for transformers, its remote code."""
    config.save_pretrained(folder)
    scalars = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    nested = {
        f"{part}_config": json.loads((folder / f"{part}_config.json").read_text(encoding="utf-8"))
        for part in ("llm", "vit")
        if (folder / f"{part}_config.json").is_file()
    }
    code = remote_files() if layout in ("hf", "both") else {}
    content = {
        "architectures": [ARCHITECTURE],
        **({"auto_map": dict(AUTO_MAP)} if code else {}),
        **scalars,
        "tie_word_embeddings": config.llm.tie_word_embeddings,
        **nested,
        "freeze_und": False,
        # transformers 5 reads the first, 4 the second.
        **({"dtype": dtype, "torch_dtype": dtype} if dtype != "auto" else {}),
    }
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    write_text(folder / GENERATION_FILE, json.dumps(dict(generation), indent=2) + "\n")
    if config.vit is not None and not (folder / PREPROCESSOR_FILE).exists():
        write_text(folder / PREPROCESSOR_FILE, json.dumps(preprocessor_config(config), indent=2) + "\n")
    for name, text in code.items():
        write_text(folder / name, text)
