"""UniReason: JSON arrays (or JSONL) of ``{"input_image": […], "output_image": …, "instruction": …}`` and, for text to
image, ``{"type": "T2I_SFT", "txt": …, "image": "", "image_path": …}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.json_rows import JsonRows
from echo4o.data.formats.layout import archives_below, first_row, image_finder, record_store, row_files
from echo4o.data.formats.record import Record
from echo4o.data.formats.store import Format, FormatStore, Opening

_ROWS = (".json", ".jsonl")


@dataclass(frozen=True)
class UniReasonParser(FieldParser):
    """Text-to-image rows have names of their own."""

    def kind(self, values: Mapping[str, Any]) -> str:
        return super().kind(_renamed(values))

    def record(self, values: Mapping[str, Any], where: str, folder: Path) -> Record:
        return super().record(_renamed(values), where, folder)

    def images(self, values: Mapping[str, Any]) -> tuple[list[Any], Any, tuple[str, ...]]:
        return super().images(_renamed(values))


def open_unireason(opening: Opening) -> FormatStore:
    """A JSON or JSONL file, or a folder of them."""
    files = row_files(opening, _ROWS)
    folders = list(dict.fromkeys(file.parent for file in files))
    archives = [] if opening.images else [path for folder in folders for path in archives_below(folder)]
    finder = image_finder(opening, folders, archives)
    return record_store(JsonRows(files), UniReasonParser(finder, opening.columns, single_is_edit=True))


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(values)
    if "txt" in row and "instruction" not in row:
        row["instruction"] = row.pop("txt")
    if "image_path" in row and "output_image" not in row:
        row["output_image"] = row.pop("image_path")
        if not row.get("image"):
            row.pop("image", None)
    return row


def _recognise(path: Path) -> bool:
    row = first_row(path, _ROWS)
    if row is None or "task_type" in row:
        return False
    is_edit = isinstance(row.get("input_image"), list) and {"output_image", "instruction"} <= set(row)
    return is_edit or {"txt", "image_path"} <= set(row)


FORMAT = Format(
    "unireason",
    "UniReason: JSON arrays of input_image (list), output_image, instruction",
    ("edit", "multi_ref", "t2i"),
    open_unireason,
    _recognise,
)
