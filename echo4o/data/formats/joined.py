"""Several stores as one: parts of a data set, members of a mix; and a choice of a store's rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from echo4o.data.formats.record import Record
from echo4o.data.formats.store import FormatStore


class JoinedStore:
    """The rows of several stores, one store after the other."""

    def __init__(self, stores: Sequence[FormatStore]) -> None:
        self.stores = list(stores)
        self.files: Sequence[Path | str] = list(dict.fromkeys(file for store in stores for file in store.files))
        self.unit_lengths = [length for store in stores for length in store.unit_lengths]
        self.problems = list(dict.fromkeys(line for store in stores for line in store.problems))
        self._ends = list(accumulate(len(store) for store in stores))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> dict[str, Any]:
        """The row in training's columns. Raises RowError."""
        store, row = self._place(row)
        return store.read(row)

    def record(self, row: int) -> Record:
        """The row as it is stored. Raises RowError."""
        store, row = self._place(row)
        return store.record(row)

    def kind(self, row: int) -> str:
        """Kind of the row. Raises RowError."""
        store, row = self._place(row)
        return store.kind(row)

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file, from 0."""
        store, row = self._place(row)
        return store.where(row)

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        store, row = self._place(row)
        return store.folder(row)

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams are reading."""
        for store in self.stores:
            store.expect_streams(num_streams)

    def _place(self, row: int) -> tuple[FormatStore, int]:
        part = bisect_right(self._ends, row)
        return self.stores[part], row - (self._ends[part - 1] if part else 0)


class ChosenRows:
    """Some rows of a store, in the order given; a row may be chosen repeatedly.

    Args:
        store: of all rows.
        rows: (N,) int64, ascending except where rows repeat, so that neighbours stay neighbours.
    """

    def __init__(self, store: FormatStore, rows: np.ndarray) -> None:
        self.store = store
        self.files = store.files
        self.problems = store.problems
        self._rows = rows
        self.unit_lengths = _units(rows, store.unit_lengths)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> dict[str, Any]:
        """The row in training's columns. Raises RowError."""
        return self.store.read(int(self._rows[row]))

    def record(self, row: int) -> Record:
        """The row as it is stored. Raises RowError."""
        return self.store.record(int(self._rows[row]))

    def kind(self, row: int) -> str:
        """Kind of the row. Raises RowError."""
        return self.store.kind(int(self._rows[row]))

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file, from 0."""
        return self.store.where(int(self._rows[row]))

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        return self.store.folder(int(self._rows[row]))

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams are reading."""
        self.store.expect_streams(num_streams)


def _units(rows: np.ndarray, unit_lengths: Sequence[int]) -> list[int]:
    """Runs of chosen rows that belong to one unit of the store."""
    if not len(rows):
        return []
    unit_of = np.searchsorted(np.cumsum(unit_lengths), rows, side="right")
    borders = np.flatnonzero(np.diff(unit_of)) + 1
    return np.diff(np.concatenate([[0], borders, [len(rows)]])).tolist()
