"""What every source of rows offers: rows by position, planned first and decoded late.

Planning reads image headers and tokenises text, so a row's exact token count is known before any pixel is decoded; a
row that does not fit is never decoded. Whatever is random about a row is drawn from (data_seed, epoch, source, row), so
the number of workers, ranks or restarts never changes what a row yields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from echo4o.data.errors import DataError, GridError, RowError
from echo4o.data.sample import ConditionDropout, Sample
from echo4o.data.tokenizer import SpecialTokens, Tokenizer
from echo4o.data.weights import WeightSchedule

__all__ = [
    "Address",
    "DataError",
    "GridError",
    "Limits",
    "PlannedSegment",
    "RowError",
    "RowPlan",
    "Source",
    "SourceContext",
    "SourceGroup",
    "item_seed",
]


class Address(NamedTuple):
    """Where a row is: enough to plan it again after a restart. Survives JSON as ``Address(*json_list)``."""

    source: str
    epoch: int
    index: int


class PlannedSegment(Protocol):
    """A segment before decoding. `num_tokens` includes its two markers (bos and eos for text)."""

    @property
    def kind(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def droppable(self) -> bool: ...


@dataclass(frozen=True)
class RowPlan:
    """One row, ready to be packed, with nothing decoded yet.

    Attributes:
        address: of the row.
        num_tokens: exact packed length when nothing is dropped, markers, bos and eos included.
        seed: every random decision about the row is drawn from it.
        row: ``file:row``, for messages.
        name: data set it belongs to.
        load: decodes and transforms the images; raises RowError where one turns out to be broken.
        segments: what `load` will give, in order; dropout is seeded by the row, so that the length that remains after
            it can be told before anything is decoded.
        dropout: probabilities of its own.
    """

    address: Address
    num_tokens: int
    seed: int
    row: str
    name: str
    load: Callable[[], Sample]
    segments: tuple[PlannedSegment, ...] = ()
    dropout: ConditionDropout | None = None


class Source(Protocol):
    """Rows in a position space that is shuffled anew every epoch."""

    name: str

    def __len__(self) -> int:
        """Rows an epoch."""
        ...

    def plan(self, epoch: int, position: int) -> RowPlan:
        """The row at `position` of that epoch's order. Raises RowError."""
        ...

    def locate(self, address: Address) -> RowPlan:
        """The row at a known address, planned exactly as before. Raises RowError."""
        ...

    def expect_streams(self, num_streams: int) -> None:
        """So many streams of this process will read in turn, each at a place of its own."""
        ...


@dataclass(frozen=True)
class Limits:
    """The model's patch sizes and position tables, which decide the token count of an image and whether it fits.

    Attributes:
        max_latent_size: latent tokens a side of the position table.
        vit_max_num_patch_per_side: ViT patches a side of the position table.
        latent_downsample: pixels a latent token's side (VAE downsampling × latent patch).
        vit_patch_size: pixels a ViT patch side.
        interpolate_pos: positions are spread over the table, so that any grid fits.
    """

    max_latent_size: int
    vit_max_num_patch_per_side: int
    latent_downsample: int = 16
    vit_patch_size: int = 14
    interpolate_pos: bool = False


@dataclass(frozen=True)
class SourceContext:
    """What sources need to know about the model and the run.

    Attributes:
        tokenizer, special_tokens: of the model, markers already added.
        data_seed: seed of the order and of every row.
        base_dir: folder of the dataset YAML; relative paths start there.
        limits: token arithmetic of the model.
        dataset_info: group → data set → paths, or a YAML/JSON file holding that; ``None`` where the YAML has it inline.
        visual_gen: the model has a generation branch (VAE images).
        visual_und: the model has an understanding branch; without it no ViT image is laid down.
        max_bad_file_share: the run stops where more than this share of a data set's parquet files are unreadable.
        cache_dir: folder on a disk of this machine into which parquet files are copied on first use; ``None``: nowhere.
    """

    tokenizer: Tokenizer
    special_tokens: SpecialTokens
    data_seed: int
    base_dir: Path
    limits: Limits
    dataset_info: Mapping[str, Any] | str | Path | None = None
    visual_gen: bool = True
    visual_und: bool = True
    max_bad_file_share: float = 0.1
    cache_dir: Path | None = None


@dataclass(frozen=True)
class SourceGroup:
    """One group of the dataset YAML: all its data sets in one position space.

    Attributes:
        name: key in the YAML.
        source: its rows.
        weight: relative share of samples (or tokens) drawn from it; of a schedule, the first.
        is_mandatory: every packed batch holds at least one of its samples.
        resume_data_status: a restored stream continues this group where it stopped instead of at its beginning.
        schedule: weights by optimiser step.
        replay_share: share of everything that is drawn, whatever the weights of other groups are; instead of a weight.
        weight_by: what its share is of: ``samples`` or ``tokens``.
        subset: JSON-able account of how its rows were chosen (split, max_rows); empty where all are used.
    """

    name: str
    source: Source
    weight: float = 0.0
    is_mandatory: bool = False
    resume_data_status: bool = True
    schedule: WeightSchedule | None = None
    replay_share: float | None = None
    weight_by: str = "samples"
    subset: Mapping[str, Any] = field(default_factory=dict)

    def weight_at(self, step: int) -> float:
        """Weight of the packs that are taken once `step` optimiser steps are done."""
        return self.weight if self.schedule is None else self.schedule.at(step)

    @property
    def schedule_steps(self) -> tuple[int, ...]:
        """Steps at which entries of its schedule begin."""
        return () if self.schedule is None else self.schedule.steps

    @property
    def _weights(self) -> list[float]:
        return [self.weight] if self.schedule is None else [entry.weight for entry in self.schedule.entries]

    @property
    def lowest_weight(self) -> float:
        return min(self._weights)

    @property
    def can_be_drawn(self) -> bool:
        """By its weight, at some step, or its replay_share; mandatory rows come in any case."""
        return max(self._weights) > 0 if self.replay_share is None else self.replay_share > 0

    @property
    def drawn_by_weight_alone(self) -> bool:
        """By one weight, of samples, as in upstream."""
        return self.schedule is None and self.replay_share is None and self.weight_by == "samples"

    def describe_share(self) -> str:
        """Such as ``weight 4``, ``weight 4, 1 from step 1000 by tokens``, ``a share of 0.1``."""
        if self.replay_share is not None:
            share = f"a share of {self.replay_share:g}"
        else:
            share = f"weight {self.weight:g}" if self.schedule is None else f"weight {self.schedule}"
        return share + " by tokens" * (self.weight_by == "tokens")


def item_seed(data_seed: int, epoch: int, source: str, row: int) -> int:
    """63-bit seed of one row in one epoch; the same on every machine and Python version."""
    identity = f"{data_seed}\0{epoch}\0{source}\0{row}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1
