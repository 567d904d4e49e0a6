"""Which row comes next: weighted and mandatory groups, read in spans of each epoch's order.

N consumers (ranks × workers) share every group. Consumer c takes the contiguous share ``[s·n/N, (s+1)·n/N)`` of an
epoch's n positions, with ``s = (c + epoch) mod N``: every row is read by exactly one consumer an epoch, no remainder is
dropped, and with fewer rows than consumers each consumer's turn comes in a later epoch.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.base import Address, RowPlan, SourceGroup

logger = logging.getLogger(__name__)

TOO_LONG = "too_long"
#: Consecutive unusable rows of a group after which the run stops even though not every row has been seen.
MAX_FRUITLESS_ROWS = 50_000
#: Each kind of skip is logged this often, then at 10, 100, 1,000, … occurrences.
NUM_LOGGED_SKIPS = 5
#: Rows read before the share of bad rows can stop the run (fewer where the data are smaller).
MIN_ROWS_FOR_SHARE = 100


@dataclass(frozen=True)
class GroupedRow:
    """A planned row and the group it was drawn from."""

    group: str
    plan: RowPlan


class RowLedger:
    """Counts rows read, skipped and bad; logs them sparingly; stops the run when too many are bad.

    Args:
        max_bad_row_share: of the rows read that may fail.
        num_rows: rows of all groups together; the share is judged once min(100, num_rows) rows were read.
    """

    def __init__(self, max_bad_row_share: float, num_rows: int) -> None:
        self.max_bad_row_share = max_bad_row_share
        self.min_rows = min(MIN_ROWS_FOR_SHARE, num_rows)
        self.num_rows = 0
        self.too_long = 0
        self.bad: Counter[str] = Counter()

    def count_read(self) -> None:
        self.num_rows += 1

    def count_too_long(self, plan: RowPlan, remedy: str) -> None:
        self.too_long += 1
        self._log(self.too_long, f"skipped {plan.row}: {plan.num_tokens} tokens; {remedy}")

    def count_bad(self, error: RowError, row: str = "") -> None:
        """Count a failed row. Raises DataError once more than max_bad_row_share of the rows have failed."""
        self.bad[error.reason] += 1
        self._log(self.bad[error.reason], f"skipped a bad row: {error if error.where else f'{row}: {error}'}")
        num_bad = self.bad.total()
        if self.num_rows >= self.min_rows and num_bad > self.max_bad_row_share * self.num_rows:
            raise DataError(
                f"{num_bad} of {self.num_rows} rows read are bad, more than max_bad_row_share = "
                f"{self.max_bad_row_share:g} allows: {self.summary()}.\n  The last one: {error}\n"
                "  Repair or remove these rows, or pass a higher --max_bad_row_share."
            )

    def summary(self) -> str:
        counts = [f"{count} × {reason}" for reason, count in self.bad.most_common()]
        if self.too_long:
            counts.append(f"{self.too_long} × {TOO_LONG}")
        return ", ".join(counts) or "none"

    def counters(self) -> dict[str, int]:
        """``rows`` read, ``too_long``, ``bad_rows`` and one ``bad: reason`` each."""
        reasons = {f"bad: {reason}": count for reason, count in sorted(self.bad.items())}
        return {"rows": self.num_rows, TOO_LONG: self.too_long, "bad_rows": self.bad.total(), **reasons}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.num_rows, TOO_LONG: self.too_long, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_rows, self.too_long, self.bad = state["rows"], state[TOO_LONG], Counter(state["bad"])

    @staticmethod
    def _log(count: int, message: str) -> None:
        if count <= NUM_LOGGED_SKIPS or count == 10 ** (len(str(count)) - 1):
            logger.warning("%s%s", message, "" if count < NUM_LOGGED_SKIPS else f" (no. {count}; most go unlogged)")


class GroupCursor:
    """One consumer's place in one group.

    `spans` are the ``[epoch, start, stop)`` positions that this consumer has taken on and not yet read; `epoch` is the
    first epoch of which it has not taken a share. Nothing in them depends on the number of consumers, so that they can
    be dealt out anew.
    """

    def __init__(self, group: SourceGroup, consumer: int, num_consumers: int) -> None:
        self.group = group
        self.consumer = consumer
        self.num_consumers = num_consumers
        self.num_rows = len(group.source)
        self.epoch = 0
        self.spans: list[list[int]] = []
        if not self.num_rows:
            raise DataError(
                f"group {group.name} has no rows; check its data_dir and num_used_data, or remove the group"
            )

    def advance(self) -> tuple[int, int]:
        """The next (epoch, position)."""
        while not self.spans:
            share = (self.consumer + self.epoch) % self.num_consumers
            start = share * self.num_rows // self.num_consumers
            stop = (share + 1) * self.num_rows // self.num_consumers
            if start < stop:
                self.spans.append([self.epoch, start, stop])
            self.epoch += 1
        span = self.spans[0]
        epoch, position = span[0], span[1]
        span[1] += 1
        if span[1] == span[2]:
            self.spans.pop(0)
        return epoch, position

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.num_rows, "epoch": self.epoch, "spans": [list(span) for span in self.spans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.num_rows:
            raise DataError(
                f"group {self.group.name} had {state['rows']} rows when the checkpoint was written and has "
                f"{self.num_rows} now; restore the data, or start a new data stream with --resume_model_only True"
            )
        self.epoch, self.spans = state["epoch"], [list(span) for span in state["spans"]]


class Mixture:
    """An endless stream of planned rows from several groups, for one consumer.

    Args:
        groups: names are unique; at least one has a weight above 0.
        consumer, num_consumers: whose share of the rows this is.
        data_seed: of the run; group choices depend on (data_seed, consumer, number of the draw) alone.
        max_num_tokens_per_sample: longer rows are skipped and counted.
        max_bad_row_share: of the rows read that may fail.
    """

    def __init__(
        self,
        groups: Sequence[SourceGroup],
        consumer: int,
        num_consumers: int,
        data_seed: int,
        max_num_tokens_per_sample: int,
        max_bad_row_share: float = 0.1,
    ) -> None:
        self._check(groups)
        self.groups = {group.name: group for group in groups}
        self.mandatory = [group.name for group in groups if group.is_mandatory]
        self.consumer = consumer
        self.data_seed = data_seed
        self.max_num_tokens_per_sample = max_num_tokens_per_sample
        self.ledger = RowLedger(max_bad_row_share, sum(len(group.source) for group in groups))
        self.num_draws = 0
        self.plan_seconds = 0.0
        self._cursors = {group.name: GroupCursor(group, consumer, num_consumers) for group in groups}
        self._weighted = [group.name for group in groups if group.weight > 0]
        total = sum(self.groups[name].weight for name in self._weighted)
        self._thresholds = list(accumulate(self.groups[name].weight / total for name in self._weighted))

    @staticmethod
    def _check(groups: Sequence[SourceGroup]) -> None:
        names = [group.name for group in groups]
        if len(set(names)) != len(names):
            raise DataError(f"group names must differ: {', '.join(names)}")
        if any(group.weight < 0 for group in groups):
            raise DataError(f"group weights must not be negative: { {group.name: group.weight for group in groups} }")
        if not any(group.weight > 0 for group in groups):
            raise DataError(
                f"no group has a weight above 0 (groups: {', '.join(names) or 'none'}); add 'weight: 1' to one of them"
            )

    def next_row(self, group: str | None = None) -> GroupedRow:
        """The next usable row of `group`, or of a group drawn by weight.

        Raises:
            DataError: if too many rows are bad, or no row of the group can be used.
        """
        started = time.perf_counter()
        name = self._draw_group() if group is None else group
        plan = self._next_usable(name)
        self.plan_seconds += time.perf_counter() - started
        return GroupedRow(name, plan)

    def locate(self, group: str, address: Sequence) -> GroupedRow:
        """A row that was drawn earlier, by its address."""
        started = time.perf_counter()
        plan = self.groups[group].source.locate(Address(*address))
        self.plan_seconds += time.perf_counter() - started
        return GroupedRow(group, plan)

    def _draw_group(self) -> str:
        identity = f"{self.data_seed}\0{self.consumer}\0{self.num_draws}".encode()
        self.num_draws += 1
        draw = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") / 2**64
        for name, threshold in zip(self._weighted, self._thresholds, strict=True):
            if draw < threshold:
                return name
        return self._weighted[-1]

    def _next_usable(self, name: str) -> RowPlan:
        cursor, fruitless = self._cursors[name], 0
        seen: set[int | str] = set()
        while True:
            epoch, position = cursor.advance()
            self.ledger.count_read()
            try:
                plan = cursor.group.source.plan(epoch, position)
            except RowError as error:
                self.ledger.count_bad(error)
                seen.add(error.where or position)
            else:
                if plan.num_tokens <= self.max_num_tokens_per_sample:
                    return plan
                self.ledger.count_too_long(plan, self._remedy(plan))
                seen.add(plan.address.index)
            fruitless += 1
            if len(seen) >= cursor.num_rows or fruitless >= MAX_FRUITLESS_ROWS:
                raise DataError(
                    f"none of {fruitless} rows read in a row from group {name} could be used: "
                    f"{self.ledger.summary()}.\n"
                    f"  max_num_tokens_per_sample is {self.max_num_tokens_per_sample}: raise it (with max_num_tokens), "
                    "or lower max_image_size or max_pixels in image_transform_args."
                )

    def _remedy(self, plan: RowPlan) -> str:
        return (
            f"max_num_tokens_per_sample {plan.num_tokens} (and max_num_tokens) would keep it, "
            f"now {self.max_num_tokens_per_sample}"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the stream goes on exactly after `load_state_dict`."""
        return {
            "draws": self.num_draws,
            "groups": {name: cursor.state_dict() for name, cursor in self._cursors.items()},
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the groups are not those of the state."""
        if set(state["groups"]) != set(self._cursors):
            raise DataError(
                f"the checkpoint's data stream mixes {', '.join(sorted(state['groups']))}, this run "
                f"{', '.join(sorted(self._cursors))}; use the same dataset YAML, or --resume_model_only True"
            )
        self.num_draws = state["draws"]
        self.ledger.load_state_dict(state["ledger"])
        for name, cursor in self._cursors.items():
            if cursor.group.resume_data_status:
                cursor.load_state_dict(state["groups"][name])
