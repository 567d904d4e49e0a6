"""Logical streams: which stream makes which pack, whatever the number of ranks and worker processes.

An optimiser step takes P packs over all ranks. Each of its P slots is served by k streams in turn: step t takes for
slot p the next pack of stream ``p + P · (t mod k)``. Stream s is consumer s of ``P · k`` of the mixture. Rank r takes
the slots ``r · A … r · A + A − 1``, so that 1 rank × 4 packs, 2 × 2 and 4 × 1 train on the same packs in every step.
k streams a slot keep k worker processes busy even where a rank takes one pack a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from echo4o.data.composition import BatchComposer, PackLimits
from echo4o.data.errors import DataError
from echo4o.data.mixture import Mixture
from echo4o.data.packing import Packer
from echo4o.data.sources.base import SourceGroup
from echo4o.packed import PackedBatch

#: Streams a pack where the number of workers divides it: runs with 0, 1, 2 and 4 workers have the same streams.
USUAL_STREAMS_PER_PACK = 4


def streams_per_pack(num_workers: int) -> int:
    """Streams that serve one slot of a step by default: as many as keep every worker busy."""
    return USUAL_STREAMS_PER_PACK if USUAL_STREAMS_PER_PACK % max(1, num_workers) == 0 else num_workers


@dataclass(frozen=True)
class StreamLayout:
    """Which streams a rank takes its packs from. A *position* is the number of a pack among those of the rank, from 0.

    Attributes:
        packs_per_step: of an optimiser step, over all ranks.
        streams_per_pack: that serve one slot of a step in turn.
        packs_per_rank: of an optimiser step, on one rank.
        rank: whose packs these are.
        first_step: optimiser steps that were done before position 0.
    """

    packs_per_step: int
    streams_per_pack: int
    packs_per_rank: int
    rank: int
    first_step: int = 0

    @property
    def num_streams(self) -> int:
        """Over all ranks."""
        return self.packs_per_step * self.streams_per_pack

    @property
    def period(self) -> int:
        """Packs of the rank after which its streams come round again."""
        return self.packs_per_rank * self.streams_per_pack

    def stream_at(self, position: int) -> int:
        step, place = divmod(position, self.packs_per_rank)
        slot = self.rank * self.packs_per_rank + place
        return slot + self.packs_per_step * (step % self.streams_per_pack)

    def step_at(self, position: int) -> int:
        """Optimiser steps that are done when the pack is taken."""
        return self.first_step + position // self.packs_per_rank

    @property
    def own_streams(self) -> list[int]:
        """The streams of this rank, in the order of their turns."""
        return [self.stream_at(position) for position in range(self.period)]

    def num_workers(self, wanted: int) -> int:
        """As many workers as possible of which each has streams of its own."""
        return max((number for number in range(1, wanted + 1) if self.period % number == 0), default=0)


@dataclass
class Delivery:
    """What a stream hands over: a batch with the state after it, or the reason why there will be none."""

    batch: PackedBatch | None = None
    state: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def pin_memory(self) -> Delivery:
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


class RankStreams(IterableDataset):
    """The packs of one rank from position `first` on; inside worker i of n, every n-th from position ``first + i`` on.

    Args:
        groups, packer, limits: of the packs.
        data_seed, max_bad_row_share: of the mixture.
        layout: its period is a multiple of the number of workers, so that no stream is in two of them.
        states: where streams go on that have delivered before.
        first: position of the first pack.
    """

    def __init__(
        self,
        groups: Sequence[SourceGroup],
        packer: Packer,
        limits: PackLimits,
        data_seed: int,
        max_bad_row_share: float,
        layout: StreamLayout,
        states: Mapping[int, dict[str, Any]],
        first: int,
    ) -> None:
        self.groups = groups
        self.packer = packer
        self.limits = limits
        self.data_seed = data_seed
        self.max_bad_row_share = max_bad_row_share
        self.layout = layout
        self.states = states
        self.first = first

    def __iter__(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for group in self.groups:
            group.source.expect_streams(self.layout.period // num_workers)
        composers: dict[int, BatchComposer] = {}
        try:
            for position in count(self.first + number, num_workers):
                stream = self.layout.stream_at(position)
                if stream not in composers:
                    composers[stream] = self._composer(stream)
                composer = composers[stream]
                batch = composer.next_batch(self.layout.step_at(position))
                yield Delivery(batch, composer.state_dict(), composer.counters(), composer.timings())
        except DataError as error:
            yield Delivery(error=str(error))

    def _composer(self, stream: int) -> BatchComposer:
        mixture = Mixture(
            self.groups,
            consumer=stream,
            num_consumers=self.layout.num_streams,
            data_seed=self.data_seed,
            max_num_tokens_per_sample=min(self.limits.max_num_tokens_per_sample, self.limits.max_num_tokens),
            max_bad_row_share=self.max_bad_row_share,
        )
        composer = BatchComposer(mixture, self.packer, self.limits)
        if (state := self.states.get(stream)) is not None:
            composer.load_state_dict(state)
        return composer
