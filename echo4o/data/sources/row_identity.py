"""Which row is which, as numbers that hashes are drawn from: by its place, or by what it says and shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from echo4o.data.errors import RowError
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.rows import RowStore

_Keys = np.ndarray  # (num_rows,) uint64


def place_keys(name: str, store: RowStore) -> _Keys:
    """Keys of rows by data set, name of the file (not its folder) and row in it: nothing is read."""
    keys = np.empty(len(store), dtype=np.uint64)
    files: dict[str, np.uint64] = {}
    for start, stop in _units(store):
        (first_file, first), (last_file, last) = store.where(start), store.where(stop - 1)
        if first_file == last_file and last - first == stop - 1 - start:  # consecutive rows, as in most units
            places = [(first_file, np.arange(first, last + 1, dtype=np.uint64), slice(start, stop))]
        else:
            wheres = [store.where(row) for row in range(start, stop)]
            places = [(file, np.uint64(row), start + n) for n, (file, row) in enumerate(wheres)]
        for file, rows, where in places:
            if file not in files:
                files[file] = _number([name, Path(file).name])
            keys[where] = _mixed(files[file] ^ _mixed(rows))
    return keys


def content_keys(name: str, store: RowStore, columns: Sequence[str]) -> _Keys:
    """Keys of rows by their texts and the names of their images, so that copies of a row have the same key.

    Images without a name (bytes in a column) do not count, and are not read from parquet files. Rows that cannot be
    read, or have neither text nor name, go by their place.

    Args:
        columns: that rows are made of; others do not count.
    """
    keys = place_keys(name, store)
    for row, content in _contents(store, columns):
        if content:
            keys[row] = _number(content)
    return keys


def uniform(keys: _Keys, seed: int, purpose: str) -> np.ndarray:
    """(num_rows,) float64 in [0, 1): a number for every key that depends on nothing else."""
    return _mixed(keys ^ _number([purpose, seed])) / np.float64(2**64)


def _units(store: RowStore) -> Iterator[tuple[int, int]]:
    ends = np.cumsum([0, *store.unit_lengths])
    return ((int(start), int(stop)) for start, stop in pairwise(ends) if start < stop)


def _contents(store: RowStore, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """Every row that can be read, with what counts of it."""
    if isinstance(store, ParquetRows):
        for unit, (start, stop) in enumerate(_units(store)):
            try:
                rows = store.texts(unit)
            except RowError:
                continue  # counted when it is read for training
            yield from zip(range(start, stop), (_content(row, columns) for row in rows), strict=True)
        return
    record = getattr(store, "record", None)
    for row in range(len(store)):
        try:
            if record is None:
                yield row, _content(store.read(row), columns)
            else:
                found = record(row)
                names = [image.name for image in found.images if image.name]
                yield row, _without_bytes([found.instructions, *names])
        except RowError:
            continue  # counted when it is read for training


def _content(values: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    return _without_bytes([values[column] for column in columns if values.get(column) is not None])


def _without_bytes(value: Any) -> Any:
    """Nested lists and mappings without what is empty or bytes; what is left of an image is its path."""
    if isinstance(value, Mapping):
        kept = {str(key): kept for key, part in value.items() if (kept := _without_bytes(part))}
        return kept or None
    if isinstance(value, list | tuple):
        return [kept for part in value if (kept := _without_bytes(part))]
    return None if isinstance(value, bytes | bytearray | memoryview) else value


def _number(content: list[Any]) -> np.uint64:
    text = json.dumps(content, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), dtype="<u8")[0]


def _mixed(keys: Any) -> Any:
    """splitmix64: every bit of the input decides about every bit of the output."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))
