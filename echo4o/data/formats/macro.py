"""MACRO: JSON files of ``task, idx, prompt`` (with ``<image N>``), ``input_images``, ``output_image`` and scores.

A file holds an array of rows, an object of rows, or a single row. The published tree is
``filter/{task}/{train,eval}/{bracket}/*.json``; images lie beside it in archives or extracted.
"""

from __future__ import annotations

from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import walk
from echo4o.data.formats.json_rows import JsonRows
from echo4o.data.formats.layout import archives_below, first_row, image_finder, local_path, record_store
from echo4o.data.formats.store import Format, FormatStore, Opening

_ROWS = (".json", ".jsonl")
_SPLITS = ("train", "eval")


def open_macro(opening: Opening) -> FormatStore:
    """The data set's folder, a folder in it, or one JSON file. In a tree with splits, `split` is read (train).

    Raises:
        DataError: if there are no rows, or none of the split.
    """
    path = local_path(opening)
    files = _files(path)
    if not files:
        raise DataError(f"{path} holds no JSON files; unpack filter.tar.gz, or give the folder it was unpacked to")
    split = opening.split or "train"
    inside = {file: set(file.relative_to(path).parts[:-1]) if path.is_dir() else set() for file in files}
    if any(parts & set(_SPLITS) for parts in inside.values()):
        files = [file for file in files if split in inside[file]]
        if not files:
            raise DataError(f"{path} has no split {split!r}")
    root = path if path.is_dir() else path.parent
    finder = image_finder(opening, [root], [] if opening.images else archives_below(root))
    return record_store(JsonRows(files), FieldParser(finder, opening.columns, only_kind="multi_ref"))


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else list(walk(path))
    return [file for file in files if file.suffix.lower() in _ROWS]


def _recognise(path: Path) -> bool:
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = next(([file] for file in walk(path) if file.suffix.lower() in _ROWS), [])
    row = first_row(files[0], _ROWS) if files else None
    return row is not None and "prompt" in row and "input_images" in row and ("idx" in row or "task" in row)


FORMAT = Format(
    "macro",
    "MACRO: JSON files of prompt, input_images, output_image",
    ("multi_ref",),
    open_macro,
    _recognise,
)
