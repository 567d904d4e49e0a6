"""What opening a data set needs whatever its format: its row files, its first row, where its images are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo4o.data.errors import DataError
from echo4o.data.formats.finder import ImageFinder
from echo4o.data.formats.store import Opening

_PEEK_BYTES = 1 << 20


def row_files(opening: Opening, suffixes: Sequence[str]) -> list[Path]:
    """The file that was given, or all files with these suffixes directly in the folder, by name.

    Raises:
        DataError: if there is none.
    """
    path = Path(opening.path).expanduser().absolute()
    files = files_in(path, suffixes)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if not files:
        raise DataError(f"{path} holds no {' or '.join(suffixes)} files")
    return files


def files_in(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path] if path.name.lower().endswith(tuple(suffixes)) else []
    if not path.is_dir():
        return []
    found = (entry for entry in sorted(path.iterdir()) if not entry.name.startswith("."))
    return [entry for entry in found if entry.name.lower().endswith(tuple(suffixes)) and entry.is_file()]


def image_finder(opening: Opening, files: Sequence[Path]) -> tuple[ImageFinder, list[str]]:
    """Where rows' images are looked for, and what is wrong there."""
    folders = [Path(opening.images).expanduser().absolute()] if opening.images else []
    folders += [folder for folder in dict.fromkeys(file.parent for file in files) if folder not in folders]
    return ImageFinder(folders), []


def first_json_row(path: Path, suffixes: Sequence[str]) -> dict[str, Any] | None:
    """The first row of the first file, for recognising a format; ``None`` if there is no such file or row."""
    for file in files_in(path, suffixes)[:1]:
        with file.open("rb") as reader:
            start = reader.read(_PEEK_BYTES)
        line = next((line for line in start.split(b"\n") if line.strip()), b"")
        try:
            row = json.loads(line)
        except ValueError:
            return None
        return row if isinstance(row, dict) else None
    return None


def parquet_columns(path: Path) -> list[str]:
    """Column names of a parquet file, or of the first in a folder; empty if there is none that can be read."""
    for file in files_in(path, (".parquet",)):
        try:
            return pq.read_schema(file).names
        except (pa.ArrowException, OSError):
            continue
    return []
