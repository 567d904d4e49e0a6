"""Hugging Face data sets: a `save_to_disk` folder, a folder or URL of parquet files, or an id on the hub.

Images are taken as the bytes that are stored, never decoded. Saved folders and parquet are read by pyarrow; an id on
the hub needs the library ``datasets``, unless it is streamed: then its parquet files are read in place, by row group.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.arrow_rows import SPLITS, STATE, ArrowRows
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder, walk
from echo4o.data.formats.layout import files_in, image_finder, parquet_columns
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.remote import list_files, local_or_url
from echo4o.data.sources.rows import RowStore

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(@[\w./\-~]+)?")
_UNIT_ROWS = 64
_NUM_PROBES = 16


def open_hf_dataset(opening: Opening) -> FormatStore:
    """See the module. `columns` maps our names to the data set's.

    Raises:
        DataError: if there is no such data set or split, a mapped column is not in it, or ``datasets`` is missing.
    """
    path = local_or_url(opening.path)
    folders: list[Path] = []
    if isinstance(path, Path) and path.exists():
        rows, names = _local(path, opening)
        folders = [path if path.is_dir() else path.parent]
    elif isinstance(path, str):
        rows, names = _parquet(list_files(path, (".parquet",)), opening, path)
    elif not _HUB_ID.fullmatch(opening.path):
        raise DataError(f"{opening.path} does not exist, and is no id on the hub (owner/name)")
    elif opening.streaming:
        rows, names = _streamed(opening)
    else:
        rows, names = _loaded(opening)
    for ours, theirs in opening.columns.items():
        missing = [name for name in ([theirs] if isinstance(theirs, str) else theirs) if name not in names]
        if missing:
            raise DataError(f"columns.{ours}: {opening.path} has no {', '.join(missing)}; it has {', '.join(names)}")
    finder = image_finder(opening, folders) if folders or opening.images else ImageFinder()
    parser = FieldParser(finder, opening.columns)
    return RecordStore(rows, dataclasses.replace(parser, only_kind=_first_kind(rows, parser)))


def _first_kind(rows: RowStore, parser: FieldParser) -> str:
    """Kind of the first row that can be read: all rows have the same columns, and reading them all is slow."""
    for row in range(min(len(rows), _NUM_PROBES)):
        try:
            return parser.kind(rows.read(row))
        except RowError as error:
            _log.debug("row %d: %s", row, error)
    return ""


def _local(path: Path, opening: Opening) -> tuple[RowStore, Sequence[str]]:
    if path.is_file():
        return _parquet([path], opening, str(path))
    if (path / SPLITS).is_file():
        split = opening.split or "train"
        if not (path / split / STATE).is_file():
            found = sorted(entry.name for entry in path.iterdir() if (entry / STATE).is_file())
            raise DataError(f"{path} has no split {split!r}; it has: {', '.join(found)}. Give one as split")
        path = path / split
    if (path / STATE).is_file():
        saved = ArrowRows(path)
        return saved, saved.columns
    return _parquet([file for file in walk(path) if file.suffix == ".parquet"], opening, str(path))


def _parquet(files: Sequence[Path | str], opening: Opening, place: str) -> tuple[RowStore, Sequence[str]]:
    """Parquet files of the split. Splits are told from folders and from the first part of file names."""
    files = [file for file in files if _of_split(str(file).removeprefix(place), opening.split, len(files))]
    if not files:
        split = f" of split {opening.split!r}" if opening.split else ""
        raise DataError(f"{place} holds neither {STATE} of save_to_disk nor parquet files{split}")
    names = parquet_columns(files[0])
    return ParquetRows(files, names), names


def _of_split(name: str, split: str | None, num_files: int) -> bool:
    if num_files == 1 and split is None:
        return True
    found = re.split(r"[/\-_.]", name)
    if split is not None:
        return split in found
    return not {"test", "validation", "val", "eval"} & set(found)


def _streamed(opening: Opening) -> tuple[RowStore, Sequence[str]]:
    """Parquet files of a data set on the hub: its own, or those that the hub made of it."""
    name, _, revision = opening.path.partition("@")
    places = [f"hf://datasets/{name}" + (f"@{revision}" if revision else "")]
    if not revision:
        places.append(f"hf://datasets/{name}@~parquet")
    faults = []
    for place in places:
        try:
            return _parquet(list_files(place, (".parquet",)), opening, place)
        except DataError as error:
            faults.append(str(error))
    raise DataError(f"{name} cannot be streamed; without streaming it is loaded whole:\n  " + "\n  ".join(faults))


def _loaded(opening: Opening) -> tuple[RowStore, Sequence[str]]:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{opening.path} on the hub needs the library datasets: pip install 'echo4o[hf]', or set streaming: true"
        ) from error
    name, _, revision = opening.path.partition("@")
    try:
        cache = str(opening.cache_dir) if opening.cache_dir else None
        loaded = library.load_dataset(name, split=opening.split or "train", revision=revision or None, cache_dir=cache)
    except Exception as error:  # the library raises whatever the data set's files make it
        raise DataError(f"cannot load {opening.path}: {type(error).__name__}: {error}") from error
    rows = LoadedRows(loaded, opening.path, library)
    return rows, rows.columns


class LoadedRows:
    """Rows of a data set that the library ``datasets`` has loaded."""

    def __init__(self, loaded: Any, name: str, library: Any) -> None:
        for column, feature in loaded.features.items():
            undecoded = _undecoded(feature, library)
            if undecoded != feature:
                loaded = loaded.cast_column(column, undecoded)
        self._loaded = loaded
        self.files = [name]
        full, rest = divmod(len(loaded), _UNIT_ROWS)
        self.unit_lengths = [_UNIT_ROWS] * full + [rest] * bool(rest)

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def columns(self) -> list[str]:
        return list(self._loaded.column_names)

    def read(self, row: int) -> dict[str, Any]:
        """Column values; images as ``{bytes, path}``."""
        return dict(self._loaded[row])

    def where(self, row: int) -> tuple[str, int]:
        """Name of the data set, and the row."""
        return self.files[0], row

    def folder(self, row: int) -> Path:
        """None of its own: images are stored, or named by absolute paths."""
        return Path(self.files[0])

    def expect_streams(self, num_streams: int) -> None:
        """Files are mapped: nothing has to be kept for a stream."""


def _undecoded(feature: Any, library: Any) -> Any:
    """The same feature with images as bytes."""
    if isinstance(feature, library.Image):
        return library.Image(decode=False)
    if isinstance(feature, Mapping):
        return {name: _undecoded(inner, library) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner, library) for inner in feature]
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return dataclasses.replace(feature, feature=_undecoded(inner, library))
    return feature


def _recognise(path: Path) -> bool:
    return path.is_dir() and ((path / STATE).is_file() or (path / SPLITS).is_file()) and not files_in(path, (".jsonl",))


FORMAT = Format(
    "hf_dataset",
    "Hugging Face datasets: id on the hub, save_to_disk folder, parquet; columns by mapping",
    ("multi_ref", "t2i", "edit", "vlm"),
    open_hf_dataset,
    _recognise,
)
