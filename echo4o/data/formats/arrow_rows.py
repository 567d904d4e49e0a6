"""Rows of Arrow files as `save_to_disk` of Hugging Face ``datasets`` writes them; the library itself is not needed."""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from echo4o.data.errors import DataError, RowError

STATE = "state.json"
SPLITS = "dataset_dict.json"


class ArrowRows:
    """Random access to a saved data set. Files are mapped into memory; a unit is a record batch.

    Args:
        folder: with ``state.json`` and the Arrow files that it names, in its order.

    Raises:
        DataError: if the folder is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            self.files = [folder / entry["filename"] for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no complete save_to_disk folder: {STATE}: {error}") from error
        self._tables: dict[int, pa.Table] = {}
        lengths = []
        self.unit_lengths: list[int] = []
        for number in range(len(self.files)):
            table = self._table(number)
            lengths.append(table.num_rows)
            self.unit_lengths += [batch.num_rows for batch in table.to_batches() if batch.num_rows]
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def columns(self) -> list[str]:
        return self._table(0).column_names if self.files else []

    def read(self, row: int) -> dict[str, Any]:
        """Column values as Python objects; images as ``{bytes, path}``. Raises RowError."""
        number, offset = self._place(row)
        table = self._table(number)
        try:
            return {name: table.column(name)[offset].as_py() for name in table.column_names}
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise RowError("arrow unreadable", detail=str(error)) from error

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file."""
        number, offset = self._place(row)
        return str(self.files[number]), offset

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        return self.files[self._place(row)[0]].parent

    def expect_streams(self, num_streams: int) -> None:
        """Files are mapped: nothing has to be kept for a stream."""

    def _place(self, row: int) -> tuple[int, int]:
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _table(self, number: int) -> pa.Table:
        if number not in self._tables:
            path = self.files[number]
            try:
                source = pa.memory_map(str(path))
                self._tables[number] = pa.ipc.open_stream(source).read_all()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot read {path}: {error}") from error
        return self._tables[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}
