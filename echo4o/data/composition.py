"""Which rows share a pack: a lookahead buffer of planned rows, filled into packs by exact best fit, decoded last.

Nothing starves and nothing is lost: a row that has waited for long goes into the next pack whatever fits beside it, and
a row leaves the buffer only into a pack (or, counted, as a bad row).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.mixture import GroupedRow, Mixture
from echo4o.data.packing import Packer
from echo4o.data.sample import Sample
from echo4o.packed import PackedBatch

logger = logging.getLogger(__name__)

#: A row that has waited this many packs for each row of the buffer goes into the next one. Best fit alone would leave
#: awkward sizes behind for ever; going strictly by age fills packs of one or two samples several percent less.
PATIENCE = 2
#: Packs after that in which a due row may be passed over for want of room beside the mandatory ones.
MAX_PASSES = 8


@dataclass(frozen=True)
class PackLimits:
    """Token limits of a pack and the lookahead, with upstream's meaning.

    Attributes:
        expected_num_tokens: a pack of this length is emitted.
        max_num_tokens: a pack is never longer.
        max_num_tokens_per_sample: longer rows are skipped.
        prefer_buffer_before: below this length the rows that have waited longest are preferred among equally good
            fits, beyond it the latest.
        max_buffer_size: rows of lookahead.
    """

    expected_num_tokens: int = 32768
    max_num_tokens: int = 36864
    max_num_tokens_per_sample: int = 16384
    prefer_buffer_before: int = 16384
    max_buffer_size: int = 50

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(PackLimits):
            lowest = 0 if limit.name in ("prefer_buffer_before", "max_buffer_size") else 1
            if getattr(self, limit.name) < lowest:
                raise DataError(f"{limit.name} is {getattr(self, limit.name)}; it must be at least {lowest}")
        if self.expected_num_tokens > self.max_num_tokens:
            raise DataError(
                f"expected_num_tokens ({self.expected_num_tokens}) is above max_num_tokens ({self.max_num_tokens}): "
                "no pack could reach it; lower the one or raise the other"
            )


def best_fit(sizes: Sequence[int], capacity: int, first_below: int = 0) -> list[int]:
    """Indexes of the items whose sizes add up to the largest total that fits: an exact subset sum.

    Among equally good choices, earlier items are preferred while the total is below `first_below`, then later ones.
    Sets of reachable totals are the bits of one integer each, so that fifty items take microseconds.
    """
    within = (1 << (capacity + 1)) - 1
    reachable = [1]  # totals that items i … n−1 can make, for i = n, n−1, …, 0
    for size in reversed(sizes):
        reachable.append(reachable[-1] | (reachable[-1] << size) & within)
    reachable.reverse()
    missing = reachable[0].bit_length() - 1
    total, chosen = 0, []
    for index, size in enumerate(sizes):
        rest = reachable[index + 1]
        can_take = size <= missing and rest >> (missing - size) & 1
        can_skip = rest >> missing & 1
        if can_take and (total < first_below or not can_skip):
            chosen.append(index)
            total, missing = total + size, missing - size
    return chosen


def with_restarted_groups(state: dict[str, Any], num_rows: dict[str, int]) -> dict[str, Any]:
    """A composer's state in which some groups stand at their beginning, with none of their rows waiting.

    Args:
        state: of `BatchComposer.state_dict`; left as it is.
        num_rows: rows of each group to restart.
    """
    beginning = {name: {"rows": count, "epoch": 0, "spans": []} for name, count in num_rows.items()}
    mixture = state["mixture"]
    return {
        **state,
        "mixture": {**mixture, "groups": {**mixture["groups"], **beginning}},
        "buffer": [waiting for waiting in state["buffer"] if waiting[0] not in num_rows],
        "held_back": [waiting for waiting in state["held_back"] if waiting[0] not in num_rows],
    }


@dataclass(frozen=True)
class _Waiting:
    row: GroupedRow
    num_tokens: int  # that it will take, its own dropout taken into account
    since: int  # number of packs made when it was drawn

    @property
    def address(self) -> list:
        return [self.row.group, list(self.row.plan.address), self.since]


@dataclass
class _Pack:
    room: int
    samples: list[Sample] = field(default_factory=list)
    num_tokens: int = 0


class BatchComposer:
    """Endless packed batches from a mixture, for one consumer."""

    def __init__(self, mixture: Mixture, packer: Packer, limits: PackLimits) -> None:
        self.mixture = mixture
        self.packer = packer
        self.limits = limits
        self.num_batches = 0
        self.num_samples = 0
        self.num_tokens = 0
        self._buffer: list[_Waiting] = []
        self._held_back: dict[str, _Waiting] = {}
        self._load_seconds = 0.0
        self._pack_seconds = 0.0

    def next_batch(self, step: int | None = None) -> PackedBatch:
        """The next pack; never empty.

        Args:
            step: optimiser steps done when it is taken, for weights that change; by default the packs made so far.

        Raises:
            DataError: if too many rows are bad or a group has no usable row.
        """
        pack = _Pack(self.limits.max_num_tokens)
        waiting = [(waiting.row, waiting.num_tokens) for waiting in self._buffer]
        if self.mixture.begin_pack(self.num_batches if step is None else step, waiting):
            self._buffer = []
        self._refill()
        self._add_mandatory(pack)
        while pack.num_tokens < self.limits.expected_num_tokens:
            self._refill()
            picks = self._choose(pack.room)
            if not picks:
                break
            rows = [self._buffer[index] for index in picks]
            self._buffer = [row for index, row in enumerate(self._buffer) if index not in set(picks)]
            for row in rows:
                self._add(row, pack)
        return self._finish(pack)

    @property
    def _patience(self) -> int:
        return PATIENCE * max(1, self.limits.max_buffer_size)

    @property
    def _longest_wait(self) -> int:
        return self.num_batches - self._buffer[0].since

    def _add_mandatory(self, pack: _Pack) -> None:
        """One row of every mandatory group, as far as they fit together; those that do not go first next time."""
        if self.mixture.mandatory and self._longest_wait >= self._patience + MAX_PASSES:
            logger.warning(
                "a row waited %d packs for room beside the mandatory groups (%s); this pack goes without them. "
                "Raise max_num_tokens or lower max_num_tokens_per_sample.",
                self._longest_wait,
                ", ".join(self.mixture.mandatory),
            )
            return
        names = sorted(self.mixture.mandatory, key=lambda name: name not in self._held_back)
        for name in names:
            while True:
                row = self._held_back.pop(name, None) or self._draw(name)
                if row.num_tokens > pack.room:
                    self._held_back[name] = row
                    break
                if self._add(row, pack):
                    break

    def _refill(self) -> None:
        while len(self._buffer) < max(1, self.limits.max_buffer_size):
            self._buffer.append(self._draw())

    def _draw(self, group: str | None = None) -> _Waiting:
        waiting = self._waiting(self.mixture.next_row(group))
        self.mixture.count_tokens(waiting.row, waiting.num_tokens)
        return waiting

    def _choose(self, room: int) -> list[int]:
        """Indexes of the buffered rows to add, ascending; the oldest first of all if it is due and fits."""
        sizes = [row.num_tokens for row in self._buffer]
        if self._longest_wait < self._patience or sizes[0] > room:
            return best_fit(sizes, room, self.limits.prefer_buffer_before)
        rest = best_fit(sizes[1:], room - sizes[0], self.limits.prefer_buffer_before - sizes[0])
        return [0, *(index + 1 for index in rest)]

    def _waiting(self, row: GroupedRow, since: int | None = None) -> _Waiting:
        segments, num_tokens = row.plan.segments, row.plan.num_tokens
        if segments:
            dropped = self.packer.decide(segments, row.plan.seed, row.plan.dropout).dropped
            num_tokens = sum(s.num_tokens for s, drop in zip(segments, dropped, strict=True) if not drop)
        return _Waiting(row, num_tokens, self.num_batches if since is None else since)

    def _add(self, row: _Waiting, pack: _Pack) -> bool:
        """Decode a row into the pack; a row that fails is counted and left out."""
        started = time.perf_counter()
        plan = row.row.plan
        try:
            sample = dataclasses.replace(plan.load(), seed=plan.seed, address=tuple(plan.address), dropout=plan.dropout)
            num_tokens = self.packer.laid_down_tokens(sample)
            if num_tokens > pack.room:
                raise RowError("longer than planned", detail=f"{num_tokens} tokens instead of {row.num_tokens}")
        except RowError as error:
            self.mixture.count_undecodable(row.row, error)
            return False
        finally:
            self._load_seconds += time.perf_counter() - started
        self.mixture.count_decoded(row.row)
        pack.samples.append(sample)
        pack.room -= num_tokens
        pack.num_tokens += num_tokens
        return True

    def _finish(self, pack: _Pack) -> PackedBatch:
        started = time.perf_counter()
        batch = self.packer.pack(pack.samples)
        self.num_batches += 1
        self.num_samples += len(pack.samples)
        self.num_tokens += batch.sequence_length
        self._pack_seconds += time.perf_counter() - started
        return batch

    def counters(self) -> dict[str, int]:
        """Rows read, skipped and packed since the stream began."""
        packed = {"batches": self.num_batches, "samples": self.num_samples, "tokens": self.num_tokens}
        buffered = len(self._buffer) + len(self._held_back) + self.mixture.num_returned
        return {**packed, "buffered": buffered, **self.mixture.ledger.counters()}

    def timings(self) -> dict[str, float]:
        """Seconds spent since this process began, by stage."""
        return {
            "read": self.mixture.read_seconds,
            "plan": self.mixture.plan_seconds - self.mixture.read_seconds,
            "decode": self._load_seconds,
            "pack": self._pack_seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. Rows in the buffer are kept as addresses and planned again on restore."""
        return {
            "mixture": self.mixture.state_dict(),
            "buffer": [row.address for row in self._buffer],
            "held_back": [row.address for row in self._held_back.values()],
            "packed": [self.num_batches, self.num_samples, self.num_tokens],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the data are not those that the state was taken from."""
        self.mixture.load_state_dict(state["mixture"])
        self._buffer = [self._restored(waiting) for waiting in state["buffer"]]
        self._held_back = {waiting[0]: self._restored(waiting) for waiting in state["held_back"]}
        self.num_batches, self.num_samples, self.num_tokens = state["packed"]

    def _restored(self, waiting: Sequence) -> _Waiting:
        group, address, since = waiting
        try:
            return self._waiting(self.mixture.locate(group, address), since)
        except RowError as error:
            raise DataError(
                f"a row that the checkpoint's data stream still holds cannot be read any more: {error}\n"
                "  Restore the data, or begin the data stream anew with --resume_data False."
            ) from error
