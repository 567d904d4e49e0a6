"""What opening a data set needs whatever its format: its row files, its first rows, where its images are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.archives import is_archive
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder, walk
from echo4o.data.formats.json_rows import value_spans
from echo4o.data.formats.store import Opening, RecordStore
from echo4o.data.sources.remote import cache_folder, fetched, is_url, list_files, local_or_url
from echo4o.data.sources.rows import RowStore

_PEEK_BYTES = 1 << 20
_NUM_PROBES = 8
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def local_path(opening: Opening) -> Path:
    """The path of a data set on this machine.

    Raises:
        DataError: if it does not exist, or is a URL, which this format cannot be opened from.
    """
    path = local_or_url(opening.path)
    if isinstance(path, str):
        raise DataError(f"{path} is remote; this format is read from a local folder: download it first")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return path


def row_files(opening: Opening, suffixes: Sequence[str], *, deep: bool = False, in_place: bool = False) -> list[Any]:
    """The file that was given, or all files with these suffixes in the folder, by name.

    Args:
        opening: of the data set; its path may be a URL.
        suffixes: lower case.
        deep: look in folders below too. Folders of URLs are always searched to the bottom.
        in_place: remote files are named by their URLs instead of being fetched.

    Raises:
        DataError: if there is none.
    """
    if is_url(opening.path) and isinstance(local_or_url(opening.path), str):
        urls = list_files(opening.path, suffixes)
        if not urls:
            raise DataError(f"{opening.path} holds no {' or '.join(suffixes)} files")
        folder = cache_folder(None, opening.cache_dir)
        return urls if in_place else [fetched(url, folder) for url in urls]
    path = local_path(opening)
    if deep and path.is_dir():
        files = [file for file in walk(path) if file.name.lower().endswith(tuple(suffixes))]
    else:
        files = files_in(path, suffixes)
    if not files:
        raise DataError(f"{path} holds no {' or '.join(suffixes)} files")
    return files


def files_in(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """A file with one of the suffixes, or such files directly in a folder, by name."""
    if path.is_file():
        return [path] if path.name.lower().endswith(tuple(suffixes)) else []
    if not path.is_dir():
        return []
    found = (entry for entry in sorted(path.iterdir()) if not entry.name.startswith("."))
    return [entry for entry in found if entry.name.lower().endswith(tuple(suffixes)) and entry.is_file()]


def image_finder(opening: Opening, folders: Iterable[Path], archives: Iterable[Path] = ()) -> ImageFinder:
    """Where rows' images are looked for: in `images` of the opening, if given, else in `folders` and `archives`.

    Raises:
        DataError: if `images` does not exist.
    """
    given = list(dict.fromkeys(folders))
    place = local_or_url(opening.path)
    if not opening.images and isinstance(place, str):
        return _remote_finder(opening, place.rpartition("/")[0] if Path(place).suffix else place, [])
    if not opening.images:
        root = given[0] if given else Path()
        return ImageFinder(given, list(dict.fromkeys(archives)), root=root, cache_dir=opening.cache_dir)
    place = local_or_url(opening.images)
    if isinstance(place, str):
        return _remote_finder(opening, place, given)
    if not place.exists():
        raise DataError(f"images: {place} does not exist")
    if place.is_file():
        return ImageFinder(given, [place], root=place.parent, cache_dir=opening.cache_dir)
    return ImageFinder([place, *given], archives_below(place), root=place, cache_dir=opening.cache_dir)


def record_store(rows: RowStore, parser: FieldParser) -> RecordStore:
    """The rows of a format whose parser finds images by name.

    Archives are opened now if the images of some rows are not beside them as files; otherwise only when one is missing.
    """
    problems = list(getattr(rows, "problems", ()))
    places = sorted({len(rows) * part // _NUM_PROBES for part in range(_NUM_PROBES)} | {len(rows) - 1})
    for row in places if len(rows) else ():
        try:
            references, target, _ = parser.images(rows.read(row))
        except RowError:
            continue
        if not all(parser.finder.has(image, rows.folder(row)) for image in (*references, target)):
            problems += parser.finder.open_archives()
            break
    return RecordStore(rows, parser, problems)


def _remote_finder(opening: Opening, url: str, folders: Sequence[Path]) -> ImageFinder:
    """Remote archives are fetched; loose remote images are read when they are needed."""
    urls = list_files(url)
    cache = cache_folder(None, opening.cache_dir)
    packed = [name for name in urls if is_archive(name)]
    root = url.rstrip("/") + "/"
    return ImageFinder(
        folders,
        [fetched(name, cache) for name in packed],
        root=cache,
        cache_dir=opening.cache_dir,
        labels=packed,
        remote={name.removeprefix(root): name for name in urls if name.lower().endswith(IMAGE_SUFFIXES)},
    )


def archives_below(folder: Path) -> list[Path]:
    """Archives in a folder, at any depth, by name."""
    return [path for path in walk(folder) if is_archive(path.name)] if folder.is_dir() else []


def first_row(path: Path, suffixes: Sequence[str]) -> dict[str, Any] | None:
    """The first row of the first JSON or JSONL file; ``None`` if there is no such file or row."""
    for file in files_in(path, suffixes)[:1]:
        with file.open("rb") as reader:
            start = reader.read(_PEEK_BYTES)
        text = start.decode("utf-8", "replace")
        lines = [line for line in text.split("\n", 64) if line.strip()]
        if lines and lines[0].lstrip("\ufeff ").startswith("{"):
            row = _parsed(lines[0])
            if isinstance(row, dict) and not _holds_rows(row):
                return row
        spans, _ = value_spans(text)
        row = _parsed(text[spans[0][0] : spans[0][1]]) if spans else None
        return row if isinstance(row, dict) else None
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _holds_rows(row: dict[str, Any]) -> bool:
    return bool(row) and all(isinstance(value, dict) for value in row.values())


def parquet_columns(path: Path | str) -> list[str]:
    """Column names of a parquet file, or of the first in a folder; empty if there is none that can be read."""
    if isinstance(path, str):
        import fsspec

        with fsspec.open(path, "rb") as file:
            return pq.read_schema(file).names
    for file in files_in(path, (".parquet",)):
        try:
            return pq.read_schema(file).names
        except (pa.ArrowException, OSError):
            continue
    return []
