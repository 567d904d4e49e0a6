"""Samples → PackedBatch: token order, positions, attention splits, condition dropout and time steps.

Semantics are upstream's (SPEC.md §8.8). What is ours: every random decision about a sample comes from the sample's own
seed, so that it does not depend on its neighbours, and images are passed on by reference instead of padded together.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from echo4o.data.positions import position_ids
from echo4o.data.sample import ConditionDropout, Sample, Segment
from echo4o.data.sequence import Decisions, PackedSequence, is_noised, len2weight
from echo4o.packed import PackedBatch

#: Image sizes whose position ids are kept.
MAX_CACHED_GRIDS = 1024


class BudgetError(ValueError):
    """The samples do not fit into a pack, or leave it empty."""


class SegmentLike(Protocol):
    """What dropout and lengths need to know of a segment; a planned one has it before anything is decoded."""

    @property
    def kind(self) -> str: ...

    @property
    def droppable(self) -> bool: ...


@dataclass(frozen=True)
class PackingConfig:
    """Token ids, grids and dropout of a run.

    Attributes:
        latent_downsample: image pixels per latent token side (VAE downsampling × latent_patch_size).
        max_latent_size: side of the latent position table.
        vit_max_num_patch_per_side: side of the ViT position table.
        text_cond_dropout_prob, vae_cond_dropout_prob, vit_cond_dropout_prob: each droppable segment by itself.
        all_refs_dropout_prob: all droppable images of a sample together. Independent dropout of n references leaves
            none only with probability p²ⁿ, so guidance without images would hardly ever be trained.
        ce_loss_reduction: what ce_loss_weights balance: ``token`` (1 each), ``sample`` (1/n) or ``square`` (1/√n).
        max_num_tokens: refuse longer packs; ``None`` leaves the limit to the caller.
    """

    bos_token_id: int
    eos_token_id: int
    start_of_image: int
    end_of_image: int
    latent_downsample: int = 16
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_patch_size: int = 14
    vit_max_num_patch_per_side: int = 70
    interpolate_pos: bool = False
    text_cond_dropout_prob: float = 0.0
    vae_cond_dropout_prob: float = 0.0
    vit_cond_dropout_prob: float = 0.0
    all_refs_dropout_prob: float = 0.0
    ce_loss_reduction: str = "square"
    max_num_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in [field.name for field in dataclasses.fields(self) if field.name.endswith("_prob")]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a probability lies between 0 and 1")
        len2weight(1, self.ce_loss_reduction)

    @classmethod
    def from_config(
        cls, config: PackingConfig | Mapping | object, special_tokens: Mapping | object | None = None
    ) -> PackingConfig:
        """Read from a mapping or object with (some of) these fields, such as a BagelConfig.

        Args:
            config: ``special_tokens`` may be nested in it, and ``vit_patch_size`` as ``vit.patch_size``.
            special_tokens: mapping or object with the four token ids; goes before those of `config`.

        Raises:
            ValueError: if token ids are missing, or a value is wrong.
        """
        if isinstance(config, cls) and special_tokens is None:
            return config

        def read(source: object, name: str):
            return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)

        values = {}
        if (patch_size := read(read(config, "vit"), "patch_size")) is not None:
            values["vit_patch_size"] = patch_size
        for field in dataclasses.fields(cls):
            for source in (config, read(config, "special_tokens"), special_tokens):
                if (value := read(source, field.name)) is not None:
                    values[field.name] = value
        if values.get("latent_downsample") == 0:  # what a model without VAE says
            del values["latent_downsample"]
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ValueError(
                f"the packing config ({type(config).__name__}) lacks {', '.join(missing)}; give the ids in it, under "
                "its special_tokens, or as second argument: Packer(config, special_tokens), with special_tokens = "
                "echo4o.data.tokenizer.add_special_tokens(load_tokenizer(folder))"
            )
        return cls(**values)


class Packer:
    """Lays samples end to end. Accepts a PackingConfig or anything `PackingConfig.from_config` reads."""

    def __init__(
        self, config: PackingConfig | Mapping | object, special_tokens: Mapping | object | None = None
    ) -> None:
        self.config = PackingConfig.from_config(config, special_tokens)
        self._position_ids: dict[tuple[str, int, int], np.ndarray] = {}

    def pack(
        self,
        samples: Sequence[Sample],
        generator: torch.Generator | np.random.Generator | random.Random | None = None,
    ) -> PackedBatch:
        """Lay samples end to end in one sequence.

        Token order per segment: text = bos, ids, eos (causal, one position each); image = start, patches, end (full
        or noise, one shared position). A dropped image still advances the position by one; a dropped text does not.

        Args:
            generator: seeds the samples that have no seed of their own; without one their place in `samples` is
                their seed, so that every such call draws the same.

        Raises:
            GridError: if an image exceeds the position table.
            BudgetError: if the pack is empty or longer than max_num_tokens.
        """
        seeds = [
            _draw_seed(generator, place) if sample.seed is None else sample.seed for place, sample in enumerate(samples)
        ]
        return self._lay_down(
            samples,
            [self.decide(sample.segments, seed, sample.dropout) for sample, seed in zip(samples, seeds, strict=True)],
        )

    def pack_with_drops(
        self, samples: Sequence[Sample], drops: Sequence[Sequence[bool]], timesteps: Sequence[float]
    ) -> PackedBatch:
        """As `pack`, with the decisions given.

        Args:
            drops: for each sample one flag a segment.
            timesteps: one a noised split, in the order in which they are laid down.
        """
        remaining = iter(timesteps)
        decisions = []
        for sample, dropped in zip(samples, drops, strict=True):
            steps = [0.0] * len(sample.segments)
            for split in _splits(sample.segments, dropped):
                if any(is_noised(sample.segments[index]) for index in split):
                    steps[split[0]] = next(remaining)
            decisions.append(Decisions(tuple(dropped), tuple(steps), tuple(range(len(steps)))))
        return self._lay_down(samples, decisions)

    def decide(self, segments: Sequence[SegmentLike], seed: int, dropout: ConditionDropout | None = None) -> Decisions:
        """Draw the decisions about a sample; the draws depend on nothing but its seed and number of segments.

        Args:
            dropout: probabilities that go before the run's; the draws are the same.
        """
        count = len(segments)
        generator = np.random.Generator(np.random.PCG64(seed))
        all_refs = generator.random() < self._probability("all_refs_dropout_prob", dropout)
        uniform = generator.random(count)
        timesteps = generator.standard_normal(count)
        noise_seeds = generator.integers(0, 2**63 - 1, count)
        probability = {
            "text": self._probability("text_cond_dropout_prob", dropout),
            "vae_image": self._probability("vae_cond_dropout_prob", dropout),
            "vit_image": self._probability("vit_cond_dropout_prob", dropout),
        }
        dropped = [
            segment.droppable and bool((all_refs and segment.kind != "text") or draw < probability[segment.kind])
            for segment, draw in zip(segments, uniform, strict=True)
        ]
        if all(dropped):
            dropped = [False] * count  # a sample without tokens would teach nothing
        return Decisions(tuple(dropped), tuple(timesteps.tolist()), tuple(noise_seeds.tolist()))

    def _probability(self, name: str, dropout: ConditionDropout | None) -> float:
        own = None if dropout is None else getattr(dropout, name)
        return getattr(self.config, name) if own is None else own

    def num_tokens(self, segment: Segment) -> int:
        """Tokens that a segment takes when it is not dropped, markers included. Raises GridError."""
        if segment.kind == "text":
            return len(segment.text_ids) + 2
        return len(self.grid_ids(segment.kind, *segment.pixels)) + 2

    def laid_down_tokens(self, sample: Sample) -> int:
        """Tokens that a sample with a seed takes in a pack: dropped segments take none.

        Raises:
            GridError: if an image exceeds the position table.
            ValueError: if the sample has no seed, so that its dropout is not known yet.
        """
        if sample.seed is None:
            raise ValueError(f"sample {sample.row or sample.name or sample} has no seed; give it one: Sample(seed=…)")
        dropped = self.decide(sample.segments, sample.seed, sample.dropout).dropped
        return sum(self.num_tokens(s) for s, drop in zip(sample.segments, dropped, strict=True) if not drop)

    def _lay_down(self, samples: Sequence[Sample], decisions: Sequence[Decisions]) -> PackedBatch:
        sequence = PackedSequence(self)
        for sample, decision in zip(samples, decisions, strict=True):
            sequence.add_sample(sample, decision)
        limit = self.config.max_num_tokens
        if not sequence.length:
            raise BudgetError("nothing to pack: no samples, or every segment of them was dropped")
        if limit is not None and sequence.length > limit:
            raise BudgetError(
                f"{len(samples)} samples take {sequence.length} tokens, max_num_tokens is {limit}; "
                "pack fewer samples or raise --max_num_tokens"
            )
        return sequence.batch()

    def grid_ids(self, kind: str, height: int, width: int) -> np.ndarray:
        """Places of an image's patches in its position table, (num_patches,) int64; the same array for equal sizes."""
        key = (kind, height, width)
        if key not in self._position_ids:
            if len(self._position_ids) >= MAX_CACHED_GRIDS:
                self._position_ids.clear()
            config = self.config
            patch, side = (
                (config.latent_downsample, config.max_latent_size)
                if kind == "vae_image"
                else (config.vit_patch_size, config.vit_max_num_patch_per_side)
            )
            self._position_ids[key] = position_ids(height, width, patch, side, config.interpolate_pos).numpy()
        return self._position_ids[key]


def _splits(segments: Sequence[Segment], dropped: Sequence[bool]) -> list[list[int]]:
    """Indexes of the laid-down segments, grouped by attention split."""
    splits: list[list[int]] = [[]]
    for index, (segment, drop) in enumerate(zip(segments, dropped, strict=True)):
        if segment.split_start:
            splits.append([])
        if not drop:
            splits[-1].append(index)
        if segment.split_end:
            splits.append([])
    return [split for split in splits if split]


def _draw_seed(generator: torch.Generator | np.random.Generator | random.Random | None, default: int) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=generator.device))
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(0, 2**63 - 1))
    if isinstance(generator, random.Random):
        return generator.getrandbits(63)
    if generator is None:
        return default
    raise TypeError(
        f"the generator is of type {type(generator).__name__}; pass a torch.Generator, a numpy Generator, a "
        "random.Random or None"
    )
