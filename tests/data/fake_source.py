"""Rows made of nothing but text, in memory: enough of the Source protocol to test mixing, packing and resuming."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from echo4o.data.errors import RowError
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sample import ConditionDropout, Sample, Segment
from echo4o.data.sources.base import Address, SourceGroup, item_seed

PACKER = Packer(PackingConfig(bos_token_id=1, eos_token_id=2, start_of_image=3, end_of_image=4))


@dataclass(frozen=True)
class FakeSegment:
    kind: str
    num_tokens: int
    droppable: bool


@dataclass(frozen=True)
class FakePlan:
    address: Address
    num_tokens: int
    seed: int
    row: str
    name: str
    load: FakeLoad
    segments: tuple[FakeSegment, ...] = ()
    dropout: ConditionDropout | None = None


@dataclass(frozen=True)
class FakeLoad:
    """The text's ids are the row's index, so that a pack tells which rows it holds."""

    source: FakeSource
    index: int
    seed: int
    row: str

    def __call__(self) -> Sample:
        if self.index in self.source.killers:
            os._exit(9)
        if self.index in self.source.bad_images:
            raise RowError("image truncated", self.source.name, self.index)
        sizes = (self.source.sizes[self.index], *self.source.droppable_sizes)
        segments = tuple(
            Segment("text", text_ids=(self.index + 10,) * (size - 2), loss=True, droppable=place > 0)
            for place, size in enumerate(sizes)
        )
        return Sample(segments, seed=self.seed, name=self.source.name, row=self.row)


@dataclass(eq=False)
class FakeSource:
    """`sizes[i]` tokens in row i, and `droppable_sizes` more in every row."""

    name: str
    sizes: Sequence[int]
    bad_rows: frozenset[int] = frozenset()
    bad_images: frozenset[int] = frozenset()
    killers: frozenset[int] = frozenset()
    droppable_sizes: tuple[int, ...] = ()
    tells_segments: bool = True
    data_seed: int = 0
    orders: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sizes)

    def plan(self, epoch: int, position: int) -> FakePlan:
        return self.locate(Address(self.name, epoch, self.row_index(epoch, position)))

    def row_index(self, epoch: int, position: int) -> int:
        if epoch not in self.orders:
            seed = item_seed(self.data_seed, epoch, self.name, -1)
            self.orders[epoch] = np.random.default_rng(seed).permutation(len(self))
        return int(self.orders[epoch][position])

    def expect_streams(self, num_streams: int) -> None:
        """Everything is in memory."""

    def locate(self, address: Address) -> FakePlan:
        if address.index in self.bad_rows:
            raise RowError("no instruction", self.name, address.index)
        seed = item_seed(self.data_seed, address.epoch, self.name, address.index)
        sizes = (self.sizes[address.index], *self.droppable_sizes)
        segments = tuple(FakeSegment("text", size, place > 0) for place, size in enumerate(sizes))
        row = f"{self.name}/{address.epoch}:{address.index}"
        load = FakeLoad(self, address.index, seed, row)
        return FakePlan(address, sum(sizes), seed, row, self.name, load, segments if self.tells_segments else ())


def group(name: str, sizes: Sequence[int], weight: float = 1.0, is_mandatory: bool = False, **kwargs) -> SourceGroup:
    return SourceGroup(name, FakeSource(name, sizes, **kwargs), weight, is_mandatory)
