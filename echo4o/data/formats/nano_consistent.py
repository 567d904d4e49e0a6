"""Nano-consistent-150k: ``json/{category}_cleaned.jsonl`` with ``instruction``, ``input_images`` and ``output_image``,
whose paths begin with ``Nano-150k/``; images in archives or extracted."""

from __future__ import annotations

from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.json_rows import JsonRows
from echo4o.data.formats.layout import archives_below, files_in, first_row, image_finder, local_path, record_store
from echo4o.data.formats.store import Format, FormatStore, Opening
from echo4o.data.sources.columns import as_list

_ROWS = (".jsonl",)


def open_nano_consistent(opening: Opening) -> FormatStore:
    """The data set's folder, its ``json`` folder, or one JSONL file."""
    path = local_path(opening)
    files = files_in(path / "json" if (path / "json").is_dir() else path, _ROWS)
    if not files:
        raise DataError(f"{path} has neither json/*.jsonl nor *.jsonl; give the folder of Nano-consistent-150k")
    folder = files[0].parent
    root = folder.parent if folder.name == "json" else folder
    finder = image_finder(opening, [root], [] if opening.images else archives_below(root))
    return record_store(JsonRows(files), FieldParser(finder, opening.columns))


def _recognise(path: Path) -> bool:
    if path.is_dir() and any(file.name.endswith("_cleaned.jsonl") for file in files_in(path / "json", _ROWS)):
        return True
    row = first_row(path, _ROWS) or {}
    return any("Nano-150k" in str(name) for value in row.values() for name in as_list(value))


FORMAT = Format(
    "nano_consistent",
    "Nano-consistent-150k: json/*_cleaned.jsonl, images in archives or extracted",
    ("multi_ref", "edit"),
    open_nano_consistent,
    _recognise,
)
