"""Packed batches from worker processes, in an order that can be stopped, saved and continued exactly.

Every batch carries the state of the stream that made it, so that the loader's state is that of the batches which were
*taken*, however many the workers have prepared ahead. Worker w of rank r is consumer ``r · workers + w``; batches are
taken from the workers in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from echo4o.data.composition import BatchComposer, PackLimits, with_restarted_groups
from echo4o.data.errors import DataError
from echo4o.data.mixture import Mixture, check_same_data, data_identity
from echo4o.data.packing import Packer
from echo4o.data.sources.base import SourceGroup
from echo4o.data.workers import GRACE, SHORT_GRACE, close_at_exit, end_workers
from echo4o.packed import PackedBatch

STATE_VERSION = 2


@dataclass(frozen=True)
class LoaderConfig(PackLimits):
    """Limits of a pack, and how batches are made. Names are upstream's flags where it has them.

    Attributes:
        num_workers: processes a rank; 0 makes batches in the training process.
        prefetch_factor: batches that each worker prepares ahead.
        data_seed: order of the groups (the order of the rows is the sources').
        max_bad_row_share: the run stops once more than this share of the rows that a worker read have failed, judged
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

    @property
    def num_streams(self) -> int:
        """Consumers a rank."""
        return max(1, self.num_workers)


@dataclass
class _Delivery:
    """What a stream hands over: a batch with the state after it, or the reason why there will be none."""

    batch: PackedBatch | None = None
    state: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def pin_memory(self) -> _Delivery:
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


class _Streams(IterableDataset):
    """The streams of one rank; inside a worker process, the one of that worker.

    Worker 0 delivers first, so it takes the stream whose turn it is: `first`.
    """

    def __init__(
        self,
        groups: Sequence[SourceGroup],
        packer: Packer,
        config: LoaderConfig,
        rank: int,
        world_size: int,
        states: Sequence[dict[str, Any] | None],
        first: int,
    ) -> None:
        self.groups = groups
        self.packer = packer
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.states = states
        self.first = first

    def __iter__(self) -> Iterator[_Delivery]:
        worker = get_worker_info()
        stream = (self.first + (worker.id if worker else 0)) % self.config.num_streams
        try:
            composer = self._composer(stream)
            while True:
                batch = composer.next_batch()
                yield _Delivery(batch, composer.state_dict(), composer.counters(), composer.timings())
        except DataError as error:
            yield _Delivery(error=str(error))

    def _composer(self, stream: int) -> BatchComposer:
        config = self.config
        mixture = Mixture(
            self.groups,
            consumer=self.rank * config.num_streams + stream,
            num_consumers=self.world_size * config.num_streams,
            data_seed=config.data_seed,
            max_num_tokens_per_sample=min(config.max_num_tokens_per_sample, config.max_num_tokens),
            max_bad_row_share=config.max_bad_row_share,
        )
        composer = BatchComposer(mixture, self.packer, config)
        if (state := self.states[stream]) is not None:
            composer.load_state_dict(state)
        return composer


def _identity(delivery: Any) -> Any:
    """Collate function: with batch_size=None the DataLoader would otherwise convert what it does not know."""
    return delivery


def _summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


class PackedLoader:
    """An endless iterator of packed batches for one rank.

    Args:
        groups: of the dataset YAML.
        packer: makes the batches.
        config: limits and worker processes.
        rank, world_size: whose share of the rows this is.

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
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size} ranks does not exist")
        self.groups = list(groups)
        self.packer = packer
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.num_batches = 0
        self._states: list[dict[str, Any] | None] = [None] * config.num_streams
        self._counters: list[dict[str, int]] = [{}] * config.num_streams
        self._timings: list[dict[str, float]] = [{}] * config.num_streams
        self._iterator: Iterator[_Delivery] | None = None
        Mixture(self.groups, 0, 1, config.data_seed, 1)  # reports wrong groups before any worker starts

    def __iter__(self) -> PackedLoader:
        return self

    def __next__(self) -> PackedBatch:
        if self._iterator is None:
            self._iterator = self._start()
            close_at_exit(self)
        delivery, batch = self._take(self._iterator)
        stream = self.num_batches % self.config.num_streams
        self._states[stream] = delivery.state
        self._counters[stream] = delivery.counters
        self._timings[stream] = delivery.timings
        self.num_batches += 1
        return batch

    def _start(self) -> Iterator[_Delivery]:
        config = self.config
        first = self.num_batches % config.num_streams
        streams = _Streams(self.groups, self.packer, config, self.rank, self.world_size, list(self._states), first)
        in_workers = {
            "prefetch_factor": config.prefetch_factor,
            "timeout": config.worker_timeout,
            "multiprocessing_context": config.start_method,
        }
        return iter(
            DataLoader(
                streams,
                batch_size=None,
                collate_fn=_identity,
                num_workers=config.num_workers,
                pin_memory=config.pin_memory and torch.cuda.is_available(),
                # The DataLoader draws a seed for its workers; without a generator it would advance the global one.
                generator=torch.Generator().manual_seed(config.data_seed),
                **(in_workers if config.num_workers else {}),
            )
        )

    def _take(self, iterator: Iterator[_Delivery]) -> tuple[_Delivery, PackedBatch]:
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
        """Rows read, skipped (``too_long``, ``bad: reason``) and packed, over this rank's workers."""
        return _summed(self._counters)

    def timings(self) -> dict[str, float]:
        """Seconds by stage (read, plan, decode, pack), summed over this rank's workers since they started."""
        return _summed(self._timings)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state of the stream after the last batch taken."""
        return {
            "version": STATE_VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_streams": self.config.num_streams,
            "num_batches": self.num_batches,
            "data": data_identity(self.groups, self.config.data_seed),
            "streams": copy.deepcopy(self._states),
            "counters": copy.deepcopy(self._counters),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch at which the state was taken.

        Raises:
            DataError: if the state is another rank's, of another number of ranks or workers, or of other data.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"data state of version {state.get('version')}; this program reads version {STATE_VERSION}. Begin the "
                "data stream anew with --resume_data False"
            )
        expected = {"rank": self.rank, "world_size": self.world_size, "num_streams": self.config.num_streams}
        found = {name: state[name] for name in expected}
        if found != expected:
            raise DataError(
                f"the data state was saved with {found}, this loader has {expected}; resume with as many ranks and "
                "--num_workers as before, or begin the data stream anew with --resume_data False"
            )
        check_same_data(state["data"], self.groups, self.config.data_seed)
        restarted = {group.name: len(group.source) for group in self.groups if not group.resume_data_status}
        self.close()
        self.num_batches = state["num_batches"]
        streams = copy.deepcopy(state["streams"])
        self._states = [stream and with_restarted_groups(stream, restarted) for stream in streams]
        self._counters = copy.deepcopy(state["counters"])
