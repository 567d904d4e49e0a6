"""What became of the rows read: counted, logged sparingly, and the points at which a run on bad data stops."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.base import RowPlan

logger = logging.getLogger(__name__)

TOO_LONG = "too_long"
#: Consecutive unusable rows of a group after which the run stops even though not every row has been seen.
MAX_FRUITLESS_ROWS = 50_000
#: Each kind of skip is logged this often, then at 10, 100, 1,000, … occurrences.
NUM_LOGGED_SKIPS = 5
#: Rows read before the share of bad rows can stop the run (fewer where the data are smaller): neighbouring rows come
#: from one file and often fail together, so that a short stretch says little about the whole.
MIN_ROWS_FOR_SHARE = 1000
#: As many are read in any case before it can, unless the data are fewer: streams are many, their shares may be small.
MIN_ROWS_OF_SMALL_SHARE = 100
#: Bad rows after which it can stop if not a single row was usable.
MIN_ROWS_IF_ALL_BAD = 100


class RowLedger:
    """Counts rows read, skipped and bad; logs them sparingly; stops the run when too many are bad.

    Args:
        max_bad_row_share: of the rows read that may fail.
        num_rows: of the data.
        num_consumers: that read them. The share is judged once a consumer has read its part of an epoch (at least 100
            rows, or all there are), at the latest after 1000 rows, or once 100 are bad and none is good.
    """

    def __init__(self, max_bad_row_share: float, num_rows: int, num_consumers: int = 1) -> None:
        self.max_bad_row_share = max_bad_row_share
        part = max(num_rows // num_consumers, min(num_rows, MIN_ROWS_OF_SMALL_SHARE))
        self.min_rows = min(MIN_ROWS_FOR_SHARE, part)
        self.num_rows = 0
        self.num_good = 0
        self.too_long = 0
        self.bad: Counter[str] = Counter()

    def count_read(self) -> None:
        self.num_rows += 1

    def count_good(self) -> None:
        """Count a row that was decoded."""
        self.num_good += 1

    def count_too_long(self, plan: RowPlan, remedy: str) -> None:
        self.too_long += 1
        self._log(self.too_long, f"skipped {plan.row}: {plan.num_tokens} tokens; {remedy}")

    def count_bad(self, error: RowError, row: str = "") -> None:
        """Count a failed row. Raises DataError once more than max_bad_row_share of the rows have failed."""
        self.bad[error.reason] += 1
        self._log(self.bad[error.reason], f"skipped a bad row: {error if error.where else f'{row}: {error}'}")
        num_bad = self.bad.total()
        enough = self.num_rows >= self.min_rows or (num_bad >= MIN_ROWS_IF_ALL_BAD and not self.num_good)
        if enough and num_bad > self.max_bad_row_share * self.num_rows:
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
        return {"rows": self.num_rows, "good": self.num_good, TOO_LONG: self.too_long, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_rows, self.num_good = state["rows"], state["good"]
        self.too_long, self.bad = state[TOO_LONG], Counter(state["bad"])

    @staticmethod
    def _log(count: int, message: str) -> None:
        if count <= NUM_LOGGED_SKIPS or count == 10 ** (len(str(count)) - 1):
            logger.warning("%s%s", message, "" if count < NUM_LOGGED_SKIPS else f" (no. {count}; most go unlogged)")


class FruitlessRows:
    """Rows of one group that could not be used since the last one that was decoded: a group without a single usable row
    must stop the run, whether its rows fail when they are planned or only when their images are decoded.

    Args:
        group: its name.
        num_rows: of the group.
        max_num_tokens_per_sample: for the advice about rows that are too long.
    """

    def __init__(self, group: str, num_rows: int, max_num_tokens_per_sample: int) -> None:
        self.group = group
        self.num_rows = num_rows
        self.max_num_tokens_per_sample = max_num_tokens_per_sample
        self.plans_in_a_row = 0
        self.loads_in_a_row = 0
        self.seen: set[Hashable] = set()
        self.reasons: Counter[str] = Counter()
        self.last: RowError | None = None

    def planned(self) -> None:
        """A row was planned; whether it can be decoded remains to be seen."""
        self.plans_in_a_row = 0

    def decoded(self) -> None:
        """A row was usable."""
        self.loads_in_a_row = 0
        self.seen.clear()
        self.reasons.clear()

    def not_planned(self, row: Hashable, error: RowError | None = None) -> None:
        """A row was too long, or failed with `error`. Raises DataError if no row is left to try."""
        self.plans_in_a_row += 1
        self._count(row, error, self.plans_in_a_row)

    def not_decoded(self, row: Hashable, error: RowError) -> None:
        """A row's images failed. Raises DataError if no row is left to try."""
        self.loads_in_a_row += 1
        self._count(row, error, self.loads_in_a_row)

    def _count(self, row: Hashable, error: RowError | None, in_a_row: int) -> None:
        self.seen.add(row)
        self.reasons[error.reason if error else TOO_LONG] += 1
        self.last = error or self.last
        if len(self.seen) >= self.num_rows or in_a_row >= MAX_FRUITLESS_ROWS:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"none of {self.reasons.total()} rows read in a row from group {self.group} could be used: {reasons}."
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        advice = ""
        if set(self.reasons) - {TOO_LONG}:
            advice += (
                f"\n  The last one that failed: {self.last}\n"
                f"  Repair these rows, or correct the paths of group {self.group} in dataset_info; the log names rows."
            )
        if TOO_LONG in self.reasons:
            advice += (
                f"\n  max_num_tokens_per_sample is {self.max_num_tokens_per_sample}: raise it (with max_num_tokens), "
                "or lower max_image_size or max_pixels in image_transform_args."
            )
        return advice
