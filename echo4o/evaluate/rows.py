"""Rows of benchmark files: read, checked, with errors that name the line."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import BenchmarkDataError, Item

_MISSING = object()


def data_file(path: Path, names: Sequence[str], title: str) -> Path:
    """The file itself, or the first of `names` in the folder.

    Raises:
        BenchmarkDataError: if there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise BenchmarkDataError(f"{path} holds none of {', '.join(names)}; pass the data file of {title}")
    raise BenchmarkDataError(f"{path} does not exist; pass the data file of {title} ({' or '.join(names)})")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BenchmarkDataError: if it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkDataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchmarkDataError(f"{path} is no JSON: {error}") from error


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a JSONL file; empty lines are left out.

    Raises:
        BenchmarkDataError: naming the line that is no JSON object, or the file that holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkDataError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BenchmarkDataError(f"{place} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise BenchmarkDataError(f"{place} is no JSON object but {type(row).__name__}")
        rows.append((place, row))
    if not rows:
        raise BenchmarkDataError(f"{path} is empty")
    return rows


def rows_of(content: Any, path: Path, id_key: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of a JSON array of objects, or of an object id → row, where the id becomes `id_key`.

    Raises:
        BenchmarkDataError: naming what is no object.
    """
    if isinstance(content, dict):
        pairs = [(f"{path}, {key!r}", row, {id_key: key}) for key, row in content.items()]
    elif isinstance(content, list):
        pairs = [(f"{path}, entry {number}", row, {}) for number, row in enumerate(content, 1)]
    else:
        raise BenchmarkDataError(f"{path} holds neither a list nor an object of rows")
    for place, row, _ in pairs:
        if not isinstance(row, dict):
            raise BenchmarkDataError(f"{place} is no JSON object but {type(row).__name__}")
    if not pairs:
        raise BenchmarkDataError(f"{path} is empty")
    return [(place, extra | row) for place, row, extra in pairs]


def field(row: dict[str, Any], key: str, kind: type | tuple[type, ...], place: str, default: Any = _MISSING) -> Any:
    """``row[key]``, of type `kind`.

    Raises:
        BenchmarkDataError: if it is not there or of another type.
    """
    value = row.get(key, _MISSING)
    if value is _MISSING or (value is None and default is not _MISSING):
        if default is not _MISSING:
            return default
        raise BenchmarkDataError(f"{place} has no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    # True is an int in Python, but no number of a data set.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise BenchmarkDataError(f"{place}: {key!r} is {type(value).__name__} {str(value)[:60]!r}, not {wanted}")
    return value


def prompt_of(row: dict[str, Any], key: str, place: str) -> str:
    """The text to draw; an empty one is an error."""
    text = field(row, key, str, place)
    if not text.strip():
        raise BenchmarkDataError(f"{place}: {key!r} is empty")
    return text


def name_part(value: Any, place: str) -> str:
    """An id or category as it may stand in a file name.

    Raises:
        BenchmarkDataError: if it would lead out of the folder or is no name.
    """
    text = str(value)
    if not text or text in (".", "..") or len(text) > 150 or any(c in text for c in '/\\\0\n\r:*?"<>|'):
        raise BenchmarkDataError(f"{place}: {text[:60]!r} cannot be part of a file name")
    return text


def inside(folder: Path, name: str, place: str) -> Path:
    """A file that the data names, relative to its folder.

    Raises:
        BenchmarkDataError: if it is not there, or leads out of the folder.
    """
    path = Path(os.path.normpath(folder / name))
    if Path(os.path.normpath(folder)) not in path.parents:
        raise BenchmarkDataError(f"{place}: {name!r} leads out of {folder}")
    if not path.is_file():
        raise BenchmarkDataError(f"{place}: {path} does not exist; put the benchmark's images there")
    return path


def each_once(items: list[Item], source: Path | str) -> list[Item]:
    """The items.

    Raises:
        BenchmarkDataError: if two have one id, or there are none.
    """
    if not items:
        raise BenchmarkDataError(f"{source} holds no items")
    # Case is ignored: some file systems do.
    twice = [name for name, count in Counter(item.id.lower() for item in items).items() if count > 1]
    if twice:
        raise BenchmarkDataError(f"{source} has {twice[0]!r} more than once")
    return items
