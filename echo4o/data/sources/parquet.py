"""Rows of parquet files. A unit is a row group: it is read once and its rows are served from memory.

A stream reads all rows of a row group before it goes on to the next, so that one of which all were read is let go at
once. Streams that share a process are each in the middle of another one.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.node_cache import NodeCache
from echo4o.data.sources.remote import file_system

_log = logging.getLogger(__name__)
_KEPT_ROW_GROUPS = 2  # a stream: the one it reads, and one whose other rows belong to another stream
_FOOTER_THREADS = 16


class ParquetRows:
    """Random access to the rows of several parquet files, in the order given; a file may be listed repeatedly.

    Footers are read once, here, and travel with the object into worker processes. A file without rows or with an
    unreadable footer is logged, left out, and kept in `empty_files` or `unreadable_files`.

    Args:
        files: parquet files; remote ones (fsspec URLs, as text) are read in place, a row group at a time.
        columns: columns that may be read; those a file lacks are absent from its rows.
        cache: where copies of the files are read instead; they go on to be named by their own paths.
    """

    def __init__(self, files: Sequence[Path | str], columns: Sequence[str], cache: NodeCache | None = None) -> None:
        distinct = list(dict.fromkeys(files))
        with ThreadPoolExecutor(min(_FOOTER_THREADS, len(distinct) or 1)) as pool:
            found = dict(zip(distinct, pool.map(_row_group_lengths, distinct), strict=True))
        self.num_files = len(distinct)
        self.unreadable_files = [path for path in distinct if found[path] is None]
        self.empty_files = [path for path in distinct if found[path] == []]
        group_lengths = {path: lengths for path, lengths in found.items() if lengths}
        self.files = [path for path in files if path in group_lengths]
        self._columns = tuple(columns)
        self._units = [(path, group) for path in self.files for group in range(len(group_lengths[path]))]
        self.unit_lengths = [length for path in self.files for length in group_lengths[path]]
        self._unit_ends = list(accumulate(self.unit_lengths))
        self._offsets_in_file = [
            end - length for path in self.files for end, length in _ends_and_lengths(group_lengths[path])
        ]
        self._cache = cache
        self._tables: OrderedDict[tuple[Path | str, int], pa.Table] = OrderedDict()
        self._num_unread: dict[tuple[Path | str, int], int] = {}
        self._num_kept = _KEPT_ROW_GROUPS

    def __len__(self) -> int:
        return self._unit_ends[-1] if self._unit_ends else 0

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file."""
        unit, offset = self._unit_of(row)
        return str(self._units[unit][0]), self._offsets_in_file[unit] + offset

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file (of a remote file: a path that does not exist here)."""
        return Path(self._units[self._unit_of(row)[0]][0]).parent

    def read(self, row: int) -> dict[str, Any]:
        """Column values of a row as Python objects, binary as bytes. Raises RowError if its row group is broken."""
        unit, offset = self._unit_of(row)
        table = self._table(*self._units[unit])
        try:
            return {name: table.column(name)[offset].as_py() for name in table.column_names}
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise RowError("parquet unreadable", detail=str(error)) from error
        finally:
            self._count_read(self._units[unit])

    def texts(self, unit: int) -> list[dict[str, Any]]:
        """Rows of a unit without what is binary, which is not even read. Raises RowError if the row group is broken."""
        path, group = self._units[unit]
        try:
            with _opened(path) as file:
                leaves = [file.schema.column(number) for number in range(len(file.schema))]
                light = [leaf.path for leaf in leaves if leaf.path.split(".")[0] in self._columns and _is_light(leaf)]
                if not light:
                    return [{}] * self.unit_lengths[unit]
                return file.read_row_group(group, columns=light, use_threads=False).to_pylist()
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise RowError("parquet unreadable", detail=f"row group {group}: {error}") from error

    def expect_streams(self, num_streams: int) -> None:
        """Keep the row groups that so many streams are reading."""
        self._num_kept = _KEPT_ROW_GROUPS * num_streams

    def _unit_of(self, row: int) -> tuple[int, int]:
        unit = bisect_right(self._unit_ends, row)
        return unit, row - (self._unit_ends[unit - 1] if unit else 0)

    def _table(self, path: Path | str, group: int) -> pa.Table:
        key = (path, group)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        try:
            local = self._cache.local(path) if self._cache and isinstance(path, Path) else path
            with _opened(local) as file:
                columns = [name for name in file.schema_arrow.names if name in self._columns]
                # One thread: every worker process reads its own row groups, and Arrow's pool does not survive a fork.
                table = file.read_row_group(group, columns=columns, use_threads=False)
        except DataError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise RowError("parquet unreadable", detail=f"row group {group}: {error}") from error
        self._tables[key] = table
        self._num_unread[key] = table.num_rows
        while len(self._tables) > self._num_kept:
            self._forget(next(iter(self._tables)))
        return table

    def _count_read(self, key: tuple[Path | str, int]) -> None:
        self._num_unread[key] -= 1
        if not self._num_unread[key]:
            self._forget(key)

    def _forget(self, key: tuple[Path | str, int]) -> None:
        del self._tables[key], self._num_unread[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_num_unread": {}}


@contextmanager
def _opened(path: Path | str) -> Iterator[pq.ParquetFile]:
    """A local file mapped into memory, or a remote one of which only what is asked for is fetched."""
    if isinstance(path, Path):
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
        return
    system, name = file_system(path)
    with system.open(name, "rb") as raw, pq.ParquetFile(raw, pre_buffer=True) as file:
        yield file


def _is_light(leaf: Any) -> bool:
    """Of a parquet column: text or numbers, no bytes."""
    return "BYTE_ARRAY" not in leaf.physical_type or leaf.logical_type.type in ("STRING", "JSON")


def _row_group_lengths(path: Path | str) -> list[int] | None:
    """Rows of each row group of a file; an empty list if it has none, None if it is unreadable (both logged)."""
    try:
        if isinstance(path, Path) and not path.stat().st_size:
            _log.warning("skipping %s: it has zero bytes", path)
            return []
        with _opened(path) as file:
            metadata = file.metadata
    except DataError:
        raise
    except (pa.ArrowException, OSError) as error:
        _log.warning("skipping %s: not a readable parquet file (%s)", path, error)
        return None
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not sum(lengths):
        _log.warning("skipping %s: it has no rows", path)
        return []
    return lengths


def _ends_and_lengths(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(accumulate(lengths), lengths, strict=True))
