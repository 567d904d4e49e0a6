"""Which row comes next: of a group that was chosen, read in spans of each epoch's order.

N consumers (the logical streams of `echo4o.data.streams`) share every group. Consumer c takes the contiguous share
``[s·n/N, (s+1)·n/N)`` of an epoch's n positions, with ``s = (c + epoch) mod N``: every row is read by exactly one
consumer an epoch, no remainder is dropped, and with fewer rows than consumers each consumer's turn comes in a later
epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from echo4o.data.choosing import GroupChoice, check_shares
from echo4o.data.errors import DataError, RowError
from echo4o.data.ledger import FruitlessRows, RowLedger
from echo4o.data.sources.base import Address, RowPlan, SourceGroup


def _row_of(plan: RowPlan) -> tuple[str, int]:
    """The row whatever the epoch."""
    return plan.address.source, plan.address.index


@dataclass(frozen=True)
class GroupedRow:
    """A planned row and the group it was drawn from.

    Attributes:
        counts: towards the group's share of the tokens. A row that was counted when another stream drew it does not
            again, nor does one of a mandatory group that is far beyond its share.
    """

    group: str
    plan: RowPlan
    counts: bool = True


def share_of_epoch(consumer: int, epoch: int, num_rows: int, num_consumers: int) -> tuple[int, int]:
    """Positions ``[start, stop)`` of an epoch that a consumer reads."""
    share = (consumer + epoch) % num_consumers
    return share * num_rows // num_consumers, (share + 1) * num_rows // num_consumers


class GroupCursor:
    """One consumer's place in one group.

    `spans` are the ``[epoch, start, stop)`` positions that this consumer has taken on and not yet read; `epoch` is the
    first epoch of which it has not taken a share. `returned` are rows ``[epoch, index]`` that had been read and not
    used; they come first. Their tokens have been counted, but for those that are ``[epoch, index, 1]``. Nothing in them
    depends on the number of consumers, so that they can be dealt out anew (`echo4o.data.dealing`).
    """

    def __init__(self, group: SourceGroup, consumer: int, num_consumers: int) -> None:
        self.group = group
        self.consumer = consumer
        self.num_consumers = num_consumers
        self.num_rows = len(group.source)
        self.epoch = 0
        self.spans: list[list[int]] = []
        self.returned: list[list[int]] = []
        if not self.num_rows:
            raise DataError(
                f"group {group.name} has no rows; check its data_dir and num_used_data, or remove the group"
            )

    def advance(self) -> tuple[int, int]:
        """The next (epoch, position)."""
        while not self.spans:
            start, stop = share_of_epoch(self.consumer, self.epoch, self.num_rows, self.num_consumers)
            if start < stop:
                self.spans.append([self.epoch, start, stop])
            self.epoch += 1
        span = self.spans[0]
        epoch, position = span[0], span[1]
        span[1] += 1
        if span[1] == span[2]:
            self.spans.pop(0)
        return epoch, position

    def take_returned(self) -> tuple[Address, bool] | None:
        """The next row that was read and not used, if there is one, and whether its tokens are to be counted."""
        if not self.returned:
            return None
        epoch, index, *counts = self.returned.pop(0)
        return Address(self.group.source.name, epoch, index), bool(counts)

    def state_dict(self) -> dict[str, Any]:
        state = {"rows": self.num_rows, "epoch": self.epoch, "spans": [list(span) for span in self.spans]}
        return state | ({"returned": [list(row) for row in self.returned]} if self.returned else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.num_rows:
            raise DataError(
                f"group {self.group.name} had {state['rows']} rows when the checkpoint was written and has "
                f"{self.num_rows} now; restore the data, or begin the data stream anew with --resume_data False"
            )
        self.epoch, self.spans = state["epoch"], [list(span) for span in state["spans"]]
        self.returned = [list(row) for row in state.get("returned", ())]


class Mixture:
    """An endless stream of planned rows from several groups, for one consumer.

    Args:
        groups: names are unique; at least one has a weight above 0.
        consumer, num_consumers: whose share of the rows this is.
        data_seed: of the run. Group choices depend on (data_seed, consumer, number of the draw) alone, on the step too
            where a weight does, and on the tokens drawn so far where they are counted (`echo4o.data.choosing`).
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
        check_shares(groups)
        self.groups = {group.name: group for group in groups}
        self.mandatory = [group.name for group in groups if group.is_mandatory]
        self.consumer = consumer
        self.max_num_tokens_per_sample = max_num_tokens_per_sample
        num_rows = sum(len(group.source) for group in groups if group.can_be_drawn or group.is_mandatory)
        self.ledger = RowLedger(max_bad_row_share, num_rows, num_consumers)
        self.choice = GroupChoice(groups, consumer, data_seed, max_num_tokens_per_sample)
        self.plan_seconds = 0.0  # reading included
        self.read_seconds = 0.0
        self._cursors = {group.name: GroupCursor(group, consumer, num_consumers) for group in groups}
        self._fruitless = {
            name: FruitlessRows(name, cursor.num_rows, max_num_tokens_per_sample)
            for name, cursor in self._cursors.items()
        }

    def next_row(self, group: str | None = None) -> GroupedRow:
        """The next usable row of `group`, or of a group drawn by weight. Its tokens are to be counted (`count_tokens`).

        Raises:
            DataError: if too many rows are bad, or no row of the group can be used.
        """
        name = self.choice.draw() if group is None else group
        with self._timed(name):
            plan, to_count = self._next_usable(name)
        return GroupedRow(name, plan, counts=to_count and (group is None or self.choice.counts(name)))

    def count_tokens(self, row: GroupedRow, num_tokens: int) -> None:
        """A row that was drawn will take so many tokens."""
        if row.counts:
            self.choice.charge(row.group, num_tokens)

    def begin_pack(self, step: int, waiting: Sequence[tuple[GroupedRow, int]]) -> bool:
        """Draw by the weights of an optimiser step from now on. Where an entry of a schedule begins, rows that wait
        were drawn by other weights: they are given back and come first when their groups are drawn again.

        Args:
            step: optimiser steps done.
            waiting: rows that were drawn and not used, with their tokens.

        Returns:
            Whether they were given back.
        """
        given_back = self.choice.phase_begins(step)
        if given_back:
            for row, num_tokens in waiting:
                self.choice.charge(row.group, -num_tokens)
            for name, cursor in self._cursors.items():
                addresses = [row.plan.address for row, _ in waiting if row.group == name]
                cursor.returned = [[address.epoch, address.index, 1] for address in addresses] + cursor.returned
        self.choice.begin_pack(step)
        return given_back

    def locate(self, group: str, address: Sequence) -> GroupedRow:
        """A row that was drawn earlier, by its address."""
        with self._timed(group):
            return GroupedRow(group, self.groups[group].source.locate(Address(*address)))

    @contextmanager
    def _timed(self, group: str) -> Iterator[None]:
        """A source counts its own reading; several streams of one process may share it."""
        source = self.groups[group].source
        started, read_before = time.perf_counter(), getattr(source, "read_seconds", 0.0)
        try:
            yield
        finally:
            self.plan_seconds += time.perf_counter() - started
            self.read_seconds += getattr(source, "read_seconds", 0.0) - read_before

    def _next_usable(self, name: str) -> tuple[RowPlan, bool]:
        """The plan, and whether its tokens are to be counted."""
        cursor, fruitless = self._cursors[name], self._fruitless[name]
        while True:
            place, to_count = cursor.take_returned() or (cursor.advance(), True)
            if not isinstance(place, Address):
                self.ledger.count_read()
            try:
                plan = self._plan(cursor.group, place)
            except RowError as error:
                self.ledger.count_bad(error)
                fruitless.not_planned(error.where or place[-1], error)
                continue
            if plan.num_tokens <= self.max_num_tokens_per_sample:
                fruitless.planned()
                return plan, to_count
            self.ledger.count_too_long(plan, self._remedy(plan))
            fruitless.not_planned(_row_of(plan))

    @staticmethod
    def _plan(group: SourceGroup, place: Address | tuple[int, int]) -> RowPlan:
        return group.source.locate(place) if isinstance(place, Address) else group.source.plan(*place)

    @property
    def num_returned(self) -> int:
        """Rows counted as read that were not used and have not been drawn again yet."""
        return sum(len(cursor.returned) for cursor in self._cursors.values())

    def count_decoded(self, row: GroupedRow) -> None:
        """A row that was drawn has been decoded."""
        self.ledger.count_good()
        self._fruitless[row.group].decoded()

    def count_undecodable(self, row: GroupedRow, error: RowError) -> None:
        """A row that was drawn cannot be used after all.

        Raises:
            DataError: if too many rows are bad, or no row of the group can be used.
        """
        self.ledger.count_bad(error, row.plan.row)
        self._fruitless[row.group].not_decoded(_row_of(row.plan), error)

    def _remedy(self, plan: RowPlan) -> str:
        return (
            f"max_num_tokens_per_sample {plan.num_tokens} (and max_num_tokens) would keep it, "
            f"now {self.max_num_tokens_per_sample}"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the stream goes on exactly after `load_state_dict`."""
        return {
            **self.choice.state_dict(),
            "groups": {name: cursor.state_dict() for name, cursor in self._cursors.items()},
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the groups are not those of the state."""
        if set(state["groups"]) != set(self._cursors):
            raise DataError(
                f"the checkpoint's data stream mixes {', '.join(sorted(state['groups']))}, this run "
                f"{', '.join(sorted(self._cursors))}; use the same dataset YAML, or begin the data stream anew with "
                "--resume_data False"
            )
        self.choice.load_state_dict(state)
        self.ledger.load_state_dict(state["ledger"])
        for name, cursor in self._cursors.items():
            cursor.load_state_dict(state["groups"][name])
