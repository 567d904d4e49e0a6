"""Echo-4o-Image: one folder a part (Instruction-Following-Image, Surrel-Fantasy-Image, the multi-reference part), in it
rows as JSONL and ``images/`` with ``.tar.gz`` shards or what was extracted from them.

A row: ``{"task_type": "t2i", "instruction": …, "output_image": "/Echo-4o-Image/<part>/images/00000.jpg", "type": …}``;
the multi-reference part has a list of references too.
"""

from __future__ import annotations

import logging
from pathlib import Path

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.archives import is_archive
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.joined import JoinedStore
from echo4o.data.formats.json_rows import JsonRows
from echo4o.data.formats.layout import files_in, first_row, image_finder, local_path, record_store
from echo4o.data.formats.store import Format, FormatStore, Opening
from echo4o.data.sources.columns import as_list

_log = logging.getLogger(__name__)
_ROWS = (".jsonl", ".json")
_PREFIX = "Echo-4o-Image"
_PARTS = ("Instruction-Following-Image", "Surrel-Fantasy-Image", "Multi-Reference-Image")


def open_echo4o_image(opening: Opening) -> FormatStore:
    """The data set's folder, the folder of a part, or one JSONL file.

    Raises:
        DataError: if there are no rows.
    """
    path = local_path(opening)
    files = _files(path)
    if not files:
        raise DataError(f"{path} has no JSONL file, and no folder in it has one; give the folder of Echo-4o-Image")
    stores, left_out = [], []
    for file in files:
        part = file.parent
        rows = JsonRows([file])
        # The first row tells, so that no shard is unpacked for nothing.
        if opening.kinds and len(rows) and _kind(rows, opening) not in (*opening.kinds, ""):
            left_out.append(str(file))
            continue
        shards = [entry for folder in (part / "images", part) for entry in _archives_in(folder)]
        finder = image_finder(opening, (part / "images", part), shards)
        stores.append(record_store(rows, FieldParser(finder, opening.columns)))
    if left_out:
        _log.info("left out, as their rows are of another kind than %s: %s", opening.kinds, ", ".join(left_out))
    if not stores:
        raise DataError(f"{path} has no rows of kind {' or '.join(opening.kinds)}; found: {', '.join(left_out)}")
    return stores[0] if len(stores) == 1 else JoinedStore(stores)


def _files(path: Path) -> list[Path]:
    """Row files: the file itself, those of a part, or those of all parts by name."""
    files = files_in(path, _ROWS)
    if not files and path.is_dir():
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = [file for folder in folders for file in files_in(folder, _ROWS)]
    return files


def _kind(rows: JsonRows, opening: Opening) -> str:
    try:
        return FieldParser(image_finder(opening, ()), opening.columns).kind(rows.read(0))
    except RowError:
        return ""


def _archives_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if is_archive(entry.name)) if folder.is_dir() else []


def _recognise(path: Path) -> bool:
    if path.is_dir() and any((path / part).is_dir() for part in _PARTS):
        return bool(_files(path))
    for file in _files(path)[:3] if path.is_file() or path.is_dir() else ():
        row = first_row(file, _ROWS) or {}
        if any(_PREFIX in str(name) for value in row.values() for name in as_list(value)):
            return True
    return False


FORMAT = Format(
    "echo4o_image",
    "Echo-4o-Image: parts with JSONL rows and images in .tar.gz shards or extracted",
    ("t2i", "multi_ref"),
    open_echo4o_image,
    _recognise,
)
