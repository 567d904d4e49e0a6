"""Rows of JSON text by byte offset: JSONL files, and files that are one JSON array. A unit is a block of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.remote import cache_folder, fetched, local_or_url

_BLOCK_LINES = 64
_SCAN_BYTES = 1 << 24


class JsonlRows:
    """Random access to the lines of several JSONL files; blank lines are not rows.

    The line offsets are found once, here, and travel with the object into worker processes.

    Args:
        files: JSONL files, in order; remote ones (fsspec URLs) are fetched first.
        num_lines: lines to use; ``None`` for all. If larger than available, lines are repeated.
        shuffle_seed: choose the `num_lines` lines at random with this seed instead of taking the first ones.
        cache_dir: where remote files are fetched to; by default the user's cache folder.

    Raises:
        DataError: if a file does not exist or is one JSON array instead of lines.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        num_lines: int | None = None,
        shuffle_seed: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.files = [_local(file, cache_dir) for file in files]
        self._folders = [file.parent for file in self.files]
        self._names = [str(file) for file in files]
        spans = [self._row_spans(path) for path in self.files]
        file_of = np.concatenate([np.full(len(span), i, dtype=np.int32) for i, span in enumerate(spans)])
        line_of = np.concatenate([np.arange(len(span)) for span in spans])
        chosen = choose(len(file_of), num_lines, shuffle_seed)
        self._file_of, self._line_of = file_of[chosen], line_of[chosen]
        self._spans = np.concatenate(spans)[chosen]
        full_blocks, rest = divmod(len(chosen), _BLOCK_LINES)
        self.unit_lengths = [_BLOCK_LINES] * full_blocks + [rest] * bool(rest)
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._line_of)

    def where(self, row: int) -> tuple[str, int]:
        """File and line in that file, from 0."""
        return self._names[self._file_of[row]], int(self._line_of[row])

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        return self._folders[self._file_of[row]]

    def read(self, row: int) -> dict[str, Any]:
        """The line's object. Raises RowError if it is not a JSON object."""
        start, end = (int(place) for place in self._spans[row])
        try:
            # pread: descriptors are inherited by forked workers, which must not share a file position.
            line = os.pread(self._descriptor(int(self._file_of[row])), end - start, start)
            values = json.loads(line, object_pairs_hook=_without_repeats)
        except RowError:
            raise
        except OSError as error:
            raise RowError("jsonl unreadable", detail=str(error)) from error
        except UnicodeDecodeError as error:
            raise RowError("text not UTF-8", detail=f"byte {error.start} of the line: {error.reason}") from error
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise RowError("invalid json", detail=str(error)) from error
        if not isinstance(values, dict):
            raise RowError("invalid json", detail=f"the line holds a {type(values).__name__}, not an object")
        return values

    def _row_spans(self, path: Path) -> np.ndarray:
        return line_spans(path)

    def expect_streams(self, num_streams: int) -> None:
        """Lines are read one by one: nothing has to be kept for a stream."""

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.files[file], os.O_RDONLY)
        return self._descriptors[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def _local(file: Path | str, cache_dir: Path | None) -> Path:
    place = local_or_url(file) if isinstance(file, str) else file
    return fetched(place, cache_folder(None, cache_dir)) if isinstance(place, str) else place


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key stands in it twice: which of the two is meant cannot be told."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowError("duplicate key", detail=f"{repeated!r} stands in the object twice")
    return values


def choose(num_available: int, num_lines: int | None, shuffle_seed: int | None) -> np.ndarray:
    """Which lines are used, in file order so that neighbours stay neighbours."""
    if num_lines is None or not num_available:
        return np.arange(num_available)
    if num_lines >= num_available or shuffle_seed is None:
        return np.arange(num_lines) % num_available
    return np.sort(np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(num_available)[:num_lines])


def line_spans(path: Path) -> np.ndarray:
    """(num_lines, 2) int64: start and end offset of every line that is not blank."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            newlines = []
            for chunk_start in range(0, size, _SCAN_BYTES):
                chunk = np.frombuffer(file.read(_SCAN_BYTES), dtype=np.uint8)
                newlines.append(np.flatnonzero(chunk == ord("\n")) + chunk_start)
            ends = np.concatenate([*newlines, [size]]).astype(np.int64)
            starts = np.concatenate([[0], ends[:-1] + 1])
            filled = ends > starts
            # Only very short lines can be blank ("\r", spaces): look at those alone.
            for line in np.flatnonzero(filled & (ends - starts < 8)):
                file.seek(starts[line])
                filled[line] = bool(file.read(ends[line] - starts[line]).strip())
            file.seek(0)
            if file.read(64).lstrip().startswith(b"["):
                raise DataError(f"{path} is one JSON array; write one object a line: jq -c '.[]' {path} > rows.jsonl")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return np.stack([starts[filled], ends[filled]], axis=1)
