"""This project's own JSONL: ``{"instruction": …, "input_images": […], "output_image": …}`` and ``conversations``."""

from __future__ import annotations

from pathlib import Path

from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.layout import first_row, image_finder, record_store, row_files
from echo4o.data.formats.store import Format, FormatStore, Opening
from echo4o.data.sources.columns import INPUT_IMAGES, OUTPUT_IMAGE
from echo4o.data.sources.jsonl import JsonlRows


def open_native(opening: Opening) -> FormatStore:
    """A JSONL file, a folder of them, or a URL of either; image paths start at `images`, else at the file's folder."""
    files = row_files(opening, (".jsonl",))
    finder = image_finder(opening, (file.parent for file in files))
    return record_store(JsonlRows(files), FieldParser(finder, opening.columns))


def _recognise(path: Path) -> bool:
    row = first_row(path, (".jsonl",))
    if row is None:
        return False
    return "conversations" in row or any(name in row for name in (*OUTPUT_IMAGE, *INPUT_IMAGES))


FORMAT = Format(
    "native",
    "this project's JSONL: instruction, input_images, output_image; or conversations",
    ("multi_ref", "t2i", "edit", "vlm"),
    open_native,
    _recognise,
)
