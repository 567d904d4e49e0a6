"""The picture of a packed sample: what it shows is the attention layout, for every kind of data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from echo4o.data.drawing import draw_attention, match_splits
from echo4o.data.errors import DataError
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.preview import draw_row
from echo4o.data.sample import Sample, Segment

EXAMPLES = Path(__file__).resolve().parents[2] / "data_examples"


def sample_with_two_targets() -> Sample:
    def image(kind: str, side: int, **settings) -> Segment:
        return Segment(kind, image=torch.zeros(3, side, side), **settings)

    return Sample(
        (
            image("vae_image", 32),
            image("vit_image", 28),
            Segment("text", text_ids=(5, 6, 7)),
            image("vae_image", 32, loss=True),
            image("vae_image", 48, loss=True),
        ),
        seed=1,
    )


def test_every_cell_of_the_picture_says_what_the_layout_says():
    sample = sample_with_two_targets()
    packer = Packer(PackingConfig(bos_token_id=0, eos_token_id=1, start_of_image=2, end_of_image=3))
    batch = packer.pack([sample])
    size, cell = batch.sequence_length, 20
    figure = Figure(figsize=(size * cell / 100, size * cell / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw_attention(figure.add_axes((0, 0, 1, 1)), match_splits(sample, batch), batch)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    # Right of a query's own row and left of its column: on the allowed side of the causal diagonal.
    rows, columns = np.arange(size) * cell + int(0.7 * cell), np.arange(size) * cell + int(0.3 * cell)
    painted = np.abs(pixels[np.ix_(rows, columns)] - np.array([0xF4, 0xF5, 0xF7])).sum(-1) > 20

    allowed = np.zeros((size, size), dtype=bool)
    for split in batch.layout.splits:
        for query in range(split.start, split.end):
            for start, end in split.key_ranges:
                allowed[query, start : min(end, query + 1) if split.mode == "causal" else end] = True
    assert (painted == allowed).all()
    assert not painted[23:, 17:23].any(), "one target sees the other"


def test_splits_that_were_dropped_are_refused():
    sample = sample_with_two_targets()
    whole = Packer(PackingConfig(bos_token_id=0, eos_token_id=1, start_of_image=2, end_of_image=3)).pack([sample])
    with pytest.raises(ValueError, match="without dropout"):
        match_splits(Sample(sample.segments[1:], seed=1), whole)


@pytest.mark.parametrize("group", ["multi_ref", "t2i_pretrain", "unified_edit", "vlm_sft"])
def test_every_kind_of_data_is_drawn(group, tmp_path):
    out = tmp_path / "new" / "layout.png"
    draw_row(EXAMPLES / "dataset_mixed.yaml", out, group=group)
    with Image.open(out) as picture:
        assert picture.size == (1950, 1410)
        assert len(picture.convert("RGB").resize((200, 150)).getcolors(30_000)) > 50


def test_run_yaml_leads_to_its_data(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"data:\n  dataset_config_file: {EXAMPLES / 'dataset.yaml'}\n")
    draw_row(run, tmp_path / "run.png", num_refs=2)
    draw_row(EXAMPLES / "dataset.yaml", tmp_path / "data.png", num_refs=2)
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "data.png").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "video"}, "no group 'video'; there are multi_ref"),
        ({"num_refs": 9}, "0 usable rows with 9 references"),
    ],
)
def test_what_is_not_there_is_said(settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        draw_row(EXAMPLES / "dataset_heldout.yaml", tmp_path / "layout.png", **settings)


def test_unreadable_yaml_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        draw_row(tmp_path / "none.yaml", tmp_path / "layout.png")
