"""The contract between data and model: a packed batch and its attention layout.

A *pack* is several samples laid end to end in one sequence. A sample is a list of *splits*; each split is one text,
one image (with its two marker tokens) or one video, and has an attention mode:

========  ==================================================================
causal    text: each token sees the splits before it and the tokens up to itself
full      clean image: bidirectional inside, sees the splits before it
noise     image to be generated: as ``full``, and invisible to every other split
========  ==================================================================

Field names are upstream BAGEL's, so that its collated batches can be passed in unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ATTN_MODES = ("causal", "full", "noise")


class Split(NamedTuple):
    """One split of the pack: its token range and the ranges of the keys it may attend to."""

    start: int
    end: int
    mode: str
    sample: int
    #: Half-open key ranges, in order; the last one always ends at ``end`` (the split itself).
    key_ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.key_ranges)

    @property
    def num_allowed_pairs(self) -> int:
        """(query, key) pairs that attention may use."""
        pairs = self.length * self.num_keys
        return pairs - self.length * (self.length - 1) // 2 if self.mode == "causal" else pairs


@dataclass(frozen=True)
class AttentionLayout:
    """Who may attend to whom, as lengths and modes; never a matrix.

    Args:
        sample_lens: tokens of each sample, in pack order.
        split_lens: tokens of each split, in pack order; splits never cross a sample's border.
        attn_modes: ``causal``, ``full`` or ``noise`` for each split.

    Raises:
        ValueError: if the lengths do not add up or a mode is unknown.
    """

    sample_lens: Sequence[int]
    split_lens: Sequence[int]
    attn_modes: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("sample_lens", "split_lens"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        object.__setattr__(self, "attn_modes", tuple(self.attn_modes))
        if len(self.split_lens) != len(self.attn_modes):
            raise ValueError(f"{len(self.split_lens)} split_lens but {len(self.attn_modes)} attn_modes")
        if unknown := set(self.attn_modes) - set(ATTN_MODES):
            raise ValueError(f"unknown attention modes {sorted(unknown)}; known: {', '.join(ATTN_MODES)}")
        if min((*self.sample_lens, *self.split_lens), default=0) < 0:
            raise ValueError(f"lengths must not be negative: {self.sample_lens}, {self.split_lens}")
        borders = set(accumulate(self.split_lens, initial=0))
        missing = [end for end in accumulate(self.sample_lens) if end not in borders]
        if missing or sum(self.sample_lens) != sum(self.split_lens):
            raise ValueError(
                f"split_lens {self.split_lens} do not divide the samples {self.sample_lens}: "
                "every sample must end where a split ends (upstream's trailing pad split is left out here)"
            )

    @property
    def num_tokens(self) -> int:
        return sum(self.sample_lens)

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """Every non-empty split with its key ranges, in pack order."""
        return tuple(self._walk())

    @property
    def num_allowed_pairs(self) -> int:
        return sum(split.num_allowed_pairs for split in self.splits)

    def _walk(self) -> Iterator[Split]:
        sample_ends = iter(enumerate(accumulate(self.sample_lens)))
        sample, sample_end = next(sample_ends, (0, 0))
        visible: list[tuple[int, int]] = []
        start = 0
        for length, mode in zip(self.split_lens, self.attn_modes, strict=True):
            while start >= sample_end and length:
                sample, sample_end = next(sample_ends)
                visible = []
            if not length:
                continue
            end = start + length
            yield Split(start, end, mode, sample, _merge([*visible, (start, end)]))
            if mode != "noise":
                visible.append((start, end))
            start = end


def _merge(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ranges that touch, so that a sample without earlier noise has a single key range."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


@dataclass
class PackedBatch:
    """One packed sequence with everything the model needs. An absent modality is left out (``None``).

    Token indexes are positions in the sequence (0 … ``sequence_length`` − 1); every position belongs to exactly one of
    ``packed_text_indexes``, ``packed_vit_token_indexes`` and ``packed_vae_token_indexes``.
    """

    sequence_length: int
    sample_lens: list[int]
    split_lens: list[int]
    attn_modes: list[str]
    packed_text_ids: Tensor  # (n_text,) int64: words and marker tokens
    packed_text_indexes: Tensor  # (n_text,) int64
    packed_position_ids: Tensor  # (sequence_length,) int64: rope positions

    packed_vit_tokens: Tensor | None = None  # (n_vit, patch² · 3) pixels in [-1, 1]
    packed_vit_token_indexes: Tensor | None = None  # (n_vit,) int64
    packed_vit_position_ids: Tensor | None = None  # (n_vit,) int64: row · max_per_side + column
    vit_token_seqlens: Tensor | list[int] | None = None  # (n_vit_images,) patches of each image

    patchified_vae_latent_shapes: list[tuple[int, int]] | None = (
        None  # (h, w) in latent tokens, one per laid-down image
    )
    packed_latent_position_ids: Tensor | None = None  # (n_vae,) int64
    packed_vae_token_indexes: Tensor | None = None  # (n_vae,) int64
    packed_timesteps: Tensor | None = None  # (n_vae,) float32 logits, before sigmoid and shift; -inf = clean
    mse_loss_indexes: Tensor | None = None  # (n_mse,) int64

    packed_label_ids: Tensor | None = None  # (n_ce,) int64
    ce_loss_indexes: Tensor | None = None  # (n_ce,) int64
    ce_loss_weights: Tensor | None = None  # (n_ce,) float32

    # Beyond upstream: images by reference, so that one image laid down several times is encoded once.
    vae_images: list[Tensor] | None = None  # distinct images, each (3, H, W) in [-1, 1]
    vae_moments: list[Tensor] | None = None  # distinct images that a cache holds: (2·z, h, w) means and log variances
    vae_image_indexes: list[int] | None = None  # each laid-down VAE image: its place in [*vae_images, *vae_moments]
    vae_seeds: list[int] | None = None  # for each laid-down VAE image: seed of its posterior sample and flow noise
    vit_features: Tensor | None = None  # (n, hidden) vision encoder's outputs of the images that a cache holds
    vit_is_encoded: list[bool] | None = None  # each ViT image: in vit_features, and not in packed_vit_tokens
    sample_names: list[str] = field(default_factory=list)  # data set name of each sample (loss by data set)
    sample_rows: list[str] = field(default_factory=list)  # "file:row" of each sample (logs, out-of-memory reports)
    sample_addresses: list[tuple[str, int, int]] = field(default_factory=list)  # (source, epoch, index) of each sample

    def __post_init__(self) -> None:
        self.patchified_vae_latent_shapes = (
            None
            if self.patchified_vae_latent_shapes is None
            else [(int(h), int(w)) for h, w in self.patchified_vae_latent_shapes]
        )

    @cached_property
    def layout(self) -> AttentionLayout:
        return AttentionLayout(self.sample_lens, self.split_lens, self.attn_modes)

    @property
    def num_ce_tokens(self) -> int:
        return 0 if self.ce_loss_indexes is None else len(self.ce_loss_indexes)

    @property
    def num_mse_tokens(self) -> int:
        return 0 if self.mse_loss_indexes is None else len(self.mse_loss_indexes)

    def validate(self) -> None:
        """Check the internal consistency that the model relies on.

        Raises:
            ValueError: naming the first field that is wrong.
        """
        if self.layout.num_tokens != self.sequence_length:
            raise ValueError(f"splits hold {self.layout.num_tokens} tokens, sequence_length is {self.sequence_length}")
        indexes = [self.packed_text_indexes, self.packed_vit_token_indexes, self.packed_vae_token_indexes]
        covered = torch.cat([index for index in indexes if index is not None])
        if not torch.equal(covered.sort().values.cpu(), torch.arange(self.sequence_length)):
            raise ValueError("every position must be exactly one of a text, a ViT or a VAE token")
        num_vit = sum(len(part) for part in (self.packed_vit_tokens, self.vit_features) if part is not None)
        if num_vit != (0 if self.packed_vit_token_indexes is None else len(self.packed_vit_token_indexes)):
            raise ValueError("packed_vit_tokens and packed_vit_token_indexes must have one entry a token each")
        pairs = [
            ("packed_text_ids", "packed_text_indexes"),
            ("packed_vit_position_ids", "packed_vit_token_indexes"),
            ("packed_latent_position_ids", "packed_vae_token_indexes"),
            ("packed_timesteps", "packed_vae_token_indexes"),
            ("packed_label_ids", "ce_loss_indexes"),
        ]
        for one, other in pairs:
            a, b = getattr(self, one), getattr(self, other)
            if (a is None) != (b is None) or (a is not None and len(a) != len(b)):
                raise ValueError(f"{one} and {other} must have one entry a token each")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on `device`."""

        def move(value):
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [move(item) for item in value]
            return value

        return PackedBatch(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def pin_memory(self) -> PackedBatch:
        """Page-lock every tensor (called by the DataLoader)."""

        def pin(value):
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [pin(item) for item in value]
            return value

        return PackedBatch(**{f.name: pin(getattr(self, f.name)) for f in dataclasses.fields(self)})
