"""Packed batches from worker processes, in an order that can be stopped, saved and continued exactly.

Every batch carries the state of the stream that made it, so that the loader's state is that of the batches which were
*taken*, however many the workers have prepared ahead. Which stream makes which batch (`echo4o.data.streams`) depends
neither on ranks nor on workers; batches are taken from the workers in turn.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from echo4o.data.composition import PackLimits
from echo4o.data.errors import DataError
from echo4o.data.mixture import Mixture
from echo4o.data.packing import Packer
from echo4o.data.resume import STATE_VERSION, SavedRanks, resume_streams
from echo4o.data.same_data import data_identity
from echo4o.data.sources.base import SourceGroup
from echo4o.data.streams import Delivery, RankStreams, StreamLayout, streams_per_pack
from echo4o.data.workers import GRACE, SHORT_GRACE, close_at_exit, end_workers
from echo4o.packed import PackedBatch

logger = logging.getLogger(__name__)

#: Under a fork server torch's workers do not notice that their training process was killed.
_START_METHOD = "fork" if sys.platform.startswith("linux") else None


@dataclass(frozen=True)
class LoaderConfig(PackLimits):
    """Limits of a pack, and how batches are made. Names are upstream's flags where it has them.

    Attributes:
        num_workers: processes a rank; 0 makes batches in the training process.
        prefetch_factor: batches that each worker prepares ahead.
        data_seed: order of the groups (the order of the rows is the sources').
        max_bad_row_share: the run stops once more than this share of the rows that a stream read have failed, judged
            from the thousandth row on (fewer where its share of the data is smaller).
        pin_memory: page-lock batches for faster copies to a GPU; ignored without one.
        worker_timeout: seconds to wait for a worker's batch before giving up; 0 waits for ever (a worker that died is
            noticed in any case).
        start_method: ``fork``, ``spawn`` or ``forkserver``; ``None`` is the platform's own.
    """

    num_workers: int = 4
    prefetch_factor: int = 2
    data_seed: int = 42
    max_bad_row_share: float = 0.1
    pin_memory: bool = False
    worker_timeout: float = 1800.0
    start_method: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0 or self.prefetch_factor < 1:
            raise DataError(
                f"num_workers is {self.num_workers} and prefetch_factor {self.prefetch_factor}; "
                "they must be at least 0 and 1"
            )
        if not 0 <= self.max_bad_row_share <= 1:
            raise DataError(f"max_bad_row_share is {self.max_bad_row_share}; a share lies between 0 and 1")


def _identity(delivery: Any) -> Any:
    """Collate function: with batch_size=None the DataLoader would otherwise convert what it does not know."""
    return delivery


def _summed(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


class PackedLoader:
    """An endless iterator of packed batches for one rank.

    Args:
        groups: of the dataset YAML.
        packer: makes the batches.
        config: limits and worker processes.
        rank, world_size: whose packs these are.
        packs_per_rank: that a rank takes an optimiser step.

    Raises:
        DataError: while iterating, if the data cannot be used or a worker process died.
    """

    def __init__(
        self,
        groups: Sequence[SourceGroup],
        packer: Packer,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        packs_per_rank: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size} ranks does not exist")
        if packs_per_rank < 1:
            raise DataError(f"packs_per_rank (gradient_accumulation_steps) is {packs_per_rank}; it must be at least 1")
        self.groups = list(groups)
        self.packer = packer
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.layout = StreamLayout(
            world_size * packs_per_rank, streams_per_pack(config.num_workers), packs_per_rank, rank
        )
        self.num_batches = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._counters: dict[int, dict[str, int]] = {}
        self._timings: dict[int, dict[str, float]] = {}
        self._iterator: Iterator[Delivery] | None = None
        Mixture(self.groups, 0, 1, config.data_seed, 1)  # reports wrong groups before any worker starts

    def __iter__(self) -> PackedLoader:
        return self

    def __next__(self) -> PackedBatch:
        if self._iterator is None:
            self._iterator = self._start()
            close_at_exit(self)
        delivery, batch = self._take(self._iterator)
        stream = self.layout.stream_at(self.num_batches)
        self._states[stream] = delivery.state
        self._counters[stream] = delivery.counters
        self._timings[stream] = delivery.timings
        self.num_batches += 1
        return batch

    def _start(self) -> Iterator[Delivery]:
        config = self.config
        streams = RankStreams(
            self.groups,
            self.packer,
            config,
            config.data_seed,
            config.max_bad_row_share,
            self.layout,
            dict(self._states),
            self.num_batches,
        )
        num_workers = self.layout.num_workers(config.num_workers)
        if num_workers < config.num_workers and self.rank == 0:
            logger.warning(
                "%d of num_workers %d are started: that many share the %d data streams of a rank equally",
                num_workers,
                config.num_workers,
                self.layout.period,
            )
        in_workers = {
            "prefetch_factor": config.prefetch_factor,
            "timeout": config.worker_timeout,
            "multiprocessing_context": config.start_method or _START_METHOD,
        }
        return iter(
            DataLoader(
                streams,
                batch_size=None,
                collate_fn=_identity,
                num_workers=num_workers,
                pin_memory=config.pin_memory and torch.cuda.is_available(),
                # The DataLoader draws a seed for its workers; without a generator it would advance the global one.
                generator=torch.Generator().manual_seed(config.data_seed),
                **(in_workers if num_workers else {}),
            )
        )

    def _take(self, iterator: Iterator[Delivery]) -> tuple[Delivery, PackedBatch]:
        try:
            delivery = next(iterator)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("exited unexpectedly", "timed out", "is killed by signal")):
                raise
            self._close(SHORT_GRACE)
            raise DataError(
                f"a data worker died or hangs: {error}\n"
                "  Killed processes mostly ran out of memory: pass a lower --num_workers, --prefetch_factor or "
                "--max_buffer_size; a bus error means that /dev/shm is too small (docker run --shm-size=8g). "
                "With --num_workers 0 the error shows in the training process."
            ) from error
        if delivery.batch is None:
            self.close()
            raise DataError(delivery.error)
        return delivery, delivery.batch

    def close(self) -> None:
        """Stop the worker processes, those that hang too. Iterating again continues after the last batch taken."""
        self._close(GRACE)

    def _close(self, grace: float) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            end_workers(iterator, grace)

    def __del__(self) -> None:
        if getattr(self, "_iterator", None) is not None:
            self.close()

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def counters(self) -> dict[str, int]:
        """Rows read, skipped (``too_long``, ``bad: reason``) and packed, over this rank's streams."""
        return _summed(self._counters.values())

    def timings(self) -> dict[str, float]:
        """Seconds by stage (read, plan, decode, pack), summed over this rank's workers since they started."""
        return _summed(self._timings.values())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state of this rank's streams after the last batch taken."""
        return {
            "version": STATE_VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "packs_per_step": self.layout.packs_per_step,
            "streams_per_pack": self.layout.streams_per_pack,
            "num_streams": self.layout.num_streams,
            "num_batches": self.num_batches,
            "first_step": self.layout.first_step,
            "data": data_identity(self.groups, self.config.data_seed),
            "streams": {str(stream): copy.deepcopy(state) for stream, state in self._states.items()},
            "counters": {str(stream): dict(counts) for stream, counts in self._counters.items()},
        }

    def begin_at(self, step: int) -> None:
        """A run that goes on after `step` optimiser steps begins its data anew: weights are those of its step.

        Raises:
            DataError: if packs were taken already.
        """
        if self.num_batches or self._iterator is not None:
            raise DataError("begin_at is called before the first pack is taken")
        self.layout = replace(self.layout, first_step=step)

    def load_state_dict(self, read: Callable[[int], dict[str, Any]], num_ranks: int) -> None:
        """Go on after the batches at which a run's ranks saved their states.

        With as many packs a step as that run had, every step takes exactly the packs that it would have taken, on
        however many ranks. With others, what is left of the data is dealt anew: no row is lost or comes twice in an
        epoch.

        Args:
            read: gives the state that a rank saved; called for those that are needed.
            num_ranks: that saved.

        Raises:
            DataError: if the states are of another version, of other data, or of ranks in the middle of a step that
                took other packs.
        """
        resumed = resume_streams(SavedRanks(read, num_ranks), self.layout, self.groups, self.config.data_seed)
        self.close()
        self.layout = resumed.layout
        self.num_batches = resumed.num_batches
        self._states, self._counters, self._timings = resumed.states, resumed.counters, {}
