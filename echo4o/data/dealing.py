"""Dealing what is left of the data to another number of streams: no row is lost, none comes twice in an epoch.

What is left of a group are the rows that streams had drawn and not packed (by address), the positions that they had
taken on and not read, and the shares of epochs that some had not taken on yet while others had. Every rank computes the
same deal from the states of all streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from echo4o.data.choosing import merged_balances
from echo4o.data.mixture import share_of_epoch


@dataclass(frozen=True)
class Outstanding:
    """What is left of a group.

    Attributes:
        epoch: first epoch that no stream has begun; everything before it is in the other two.
        returned: ``[epoch, index]`` of rows that were drawn and not packed, sorted.
        spans: ``[epoch, start, stop)`` positions that were not read, sorted.
    """

    epoch: int
    returned: list[list[int]]
    spans: list[list[int]]

    def describe(self) -> str:
        unread = sum(stop - start for _, start, stop in self.spans)
        return f"{unread} rows unread and {len(self.returned)} that waited, of {self.epoch} epochs begun"


class Deal:
    """The states of new streams.

    Args:
        outstanding: by group.
        num_rows: by group, of those in `outstanding` and of those that begin anew.
        streams, counters: of the old streams.
        num_streams: to deal to.
    """

    def __init__(
        self,
        outstanding: Mapping[str, Outstanding],
        num_rows: Mapping[str, int],
        streams: Mapping[int, Mapping[str, Any]],
        counters: Mapping[int, Mapping[str, int]],
        num_streams: int,
    ) -> None:
        self.outstanding = outstanding
        self.num_streams = num_streams
        self._streams = streams
        self._counters = counters
        self._draws = max((state["mixture"]["draws"] for state in streams.values()), default=0)
        self._groups: list[dict[str, dict[str, Any]]] = [
            {name: {"rows": rows, "epoch": 0, "spans": []} for name, rows in num_rows.items()}
            for _ in range(num_streams)
        ]
        shares = _EqualShares(num_streams)
        for name, rest in outstanding.items():
            self._deal(name, rest, shares)

    def _deal(self, name: str, rest: Outstanding, shares: _EqualShares) -> None:
        by_epoch = [list(spans) for _, spans in groupby(rest.spans, key=lambda span: span[0])]
        for groups in self._groups:
            groups[name]["epoch"] = rest.epoch
        for stream, (start, stop) in shares.of(len(rest.returned)):
            self._groups[stream][name]["returned"] = rest.returned[start:stop]
        for spans in by_epoch:
            for stream, (start, stop) in shares.of(sum(end - begin for _, begin, end in spans)):
                self._groups[stream][name]["spans"] += _cut(spans, start, stop)

    def state(self, stream: int) -> dict[str, Any]:
        """State of a new stream's composer. What the old ones counted is handed on, so that sums stay the same."""
        before = [state for old, state in self._streams.items() if old % self.num_streams == stream]
        mixtures = [state["mixture"] for state in before]
        ledgers = [mixture["ledger"] for mixture in mixtures]
        return {
            "mixture": {
                "draws": self._draws,
                **merged_balances(mixtures),
                "groups": self._groups[stream],
                "ledger": {
                    **{name: sum(ledger[name] for ledger in ledgers) for name in ("rows", "good", "too_long")},
                    "bad": dict(sum((Counter(ledger["bad"]) for ledger in ledgers), Counter())),
                },
            },
            "buffer": [],
            "held_back": [],
            "packed": [sum(state["packed"][place] for state in before) for place in range(3)],
        }

    def counters(self, stream: int) -> dict[str, int]:
        """Counters of a new stream until it delivers; rows that wait to be drawn again are ``buffered``."""
        total: Counter[str] = Counter()
        for old, counts in self._counters.items():
            if old % self.num_streams == stream:
                total.update(counts)
        waiting = sum(len(cursor.get("returned", ())) for cursor in self._groups[stream].values())
        return {**total, "buffered": waiting}


def deal_anew(
    streams: Mapping[int, Mapping[str, Any]],
    counters: Mapping[int, Mapping[str, int]],
    num_streams_before: int,
    num_streams: int,
    num_rows: Mapping[str, int],
    restarted: Set[str] = frozenset(),
) -> Deal:
    """Deal what the old streams left to `num_streams` new ones.

    Args:
        streams: state of every old stream that has begun (`BatchComposer.state_dict`).
        counters: of the same streams.
        num_streams_before: with those that have not begun.
        num_rows: of every group.
        restarted: groups that begin anew instead.
    """
    outstanding = {
        name: outstanding_rows(name, count, streams, num_streams_before)
        for name, count in num_rows.items()
        if name not in restarted
    }
    return Deal(outstanding, num_rows, streams, counters, num_streams)


def outstanding_rows(
    group: str, num_rows: int, streams: Mapping[int, Mapping[str, Any]], num_streams: int
) -> Outstanding:
    """What `num_streams` streams have left of a group; those without a state have not begun."""
    cursors = {stream: state["mixture"]["groups"][group] for stream, state in streams.items()}
    epochs = [cursors[stream]["epoch"] if stream in cursors else 0 for stream in range(num_streams)]
    begun = max(epochs)
    spans = [list(span) for cursor in cursors.values() for span in cursor["spans"]]
    # In epoch 0, stream s has share s; in epoch e, stream s − e has it. Of a small group, most shares are empty.
    bounds = [share_of_epoch(share, 0, num_rows, num_streams) for share in range(num_streams)]
    shares = [(share, start, stop) for share, (start, stop) in enumerate(bounds) if start < stop]
    for epoch in range(min(epochs), begun):
        not_taken = [share for share in shares if epochs[(share[0] - epoch) % num_streams] <= epoch]
        spans += [[epoch, start, stop] for _, start, stop in not_taken]
    waiting = [row for state in streams.values() for row in (*state["buffer"], *state["held_back"])]
    returned = [[address[1], address[2]] for name, address, _ in waiting if name == group]
    returned += [list(place) for cursor in cursors.values() for place in cursor.get("returned", ())]
    return Outstanding(begun, sorted(returned), _merged(spans))


def _merged(spans: list[list[int]]) -> list[list[int]]:
    """Sorted, those that touch joined."""
    merged: list[list[int]] = []
    for epoch, start, stop in sorted(spans):
        if merged and merged[-1][0] == epoch and merged[-1][2] == start:
            merged[-1][2] = stop
        else:
            merged.append([epoch, start, stop])
    return merged


def _cut(spans: list[list[int]], start: int, stop: int) -> list[list[int]]:
    """The `start`-th to `stop`-th positions of spans."""
    cut, passed = [], 0
    for epoch, begin, end in spans:
        first, last = max(begin, begin + start - passed), min(end, begin + stop - passed)
        if first < last:
            cut.append([epoch, first, last])
        passed += end - begin
    return cut


class _EqualShares:
    """Contiguous shares of one lot after the other; in all, no stream gets more than one row more than another."""

    def __init__(self, num_streams: int) -> None:
        self.num_streams = num_streams
        self.next_stream = 0

    def of(self, count: int) -> list[tuple[int, tuple[int, int]]]:
        """(stream, (start, stop)) for every stream whose share is not empty."""
        size, rest = divmod(count, self.num_streams)
        first, self.next_stream = self.next_stream, (self.next_stream + rest) % self.num_streams
        num_shares = self.num_streams if size else rest
        starts = [share * size + min(share, rest) for share in range(num_shares + 1)]
        return [((first + share) % self.num_streams, bounds) for share, bounds in enumerate(pairwise(starts))]
