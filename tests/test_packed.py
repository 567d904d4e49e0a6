"""The contract between data and model."""

from __future__ import annotations

import pytest
import torch

from echo4o.packed import AttentionLayout, PackedBatch


def test_key_ranges_skip_earlier_noise_and_never_leave_the_sample() -> None:
    layout = AttentionLayout((9, 4), (2, 3, 4, 4), ("full", "noise", "causal", "noise"))
    assert [split.key_ranges for split in layout.splits] == [((0, 2),), ((0, 5),), ((0, 2), (5, 9)), ((9, 13),)]
    assert [split.sample for split in layout.splits] == [0, 0, 0, 1]
    assert [split.num_allowed_pairs for split in layout.splits] == [4, 15, 4 * 2 + 10, 16]
    assert layout.num_allowed_pairs == 4 + 15 + 18 + 16


def test_empty_splits_and_samples_are_harmless() -> None:
    layout = AttentionLayout((0, 3, 0), (0, 3), ("full", "causal"))
    assert [(split.start, split.end, split.sample) for split in layout.splits] == [(0, 3, 1)]


@pytest.mark.parametrize(
    ("sample_lens", "split_lens", "modes", "message"),
    [
        ((5,), (2, 4), ("full", "full"), "divide the samples"),
        ((3, 3), (4, 2), ("full", "full"), "divide the samples"),
        ((5,), (5,), ("sparse",), "unknown attention modes"),
        ((5,), (5,), (), "attn_modes"),
    ],
)
def test_impossible_layouts_are_refused(sample_lens, split_lens, modes, message) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionLayout(sample_lens, split_lens, modes)


def _text_batch(**changes) -> PackedBatch:
    fields = dict(
        sequence_length=4,
        sample_lens=[4],
        split_lens=[4],
        attn_modes=["causal"],
        packed_text_ids=torch.arange(4),
        packed_text_indexes=torch.arange(4),
        packed_position_ids=torch.arange(4),
    )
    return PackedBatch(**(fields | changes))


def test_validate_names_the_wrong_field() -> None:
    _text_batch().validate()
    with pytest.raises(ValueError, match="every position"):
        _text_batch(packed_text_indexes=torch.tensor([0, 1, 2, 2])).validate()
    with pytest.raises(ValueError, match="packed_label_ids and ce_loss_indexes"):
        _text_batch(ce_loss_indexes=torch.tensor([1])).validate()
    with pytest.raises(ValueError, match="sequence_length"):
        _text_batch(sequence_length=5).validate()


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = _text_batch(vae_images=[torch.zeros(3, 16, 16)], sample_names=["a"])
    moved = batch.to("meta")
    assert moved.packed_text_ids.is_meta and moved.vae_images[0].is_meta
    assert moved.sample_names == ["a"] and moved.layout == batch.layout
