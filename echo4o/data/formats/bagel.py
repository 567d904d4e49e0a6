"""Upstream BAGEL's parquet: ``image`` + ``captions`` (t2i), ``image_list`` + ``instruction_list`` (edit, multi_ref)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder
from echo4o.data.formats.joined import JoinedStore
from echo4o.data.formats.layout import files_in, parquet_columns, row_files
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.remote import local_or_url

#: Kind of row → upstream's group, the name of its folder.
_GROUPS = {"multi_ref": "multi_ref", "edit": "unified_edit", "t2i": "t2i_pretrain"}


def open_bagel(opening: Opening) -> FormatStore:
    """A parquet file, a folder of them, a folder with a folder for each group, or a URL, which is read in place.

    Edit and multi-reference files have the same columns. A data set is taken for what is asked for (`kinds`); if both
    or nothing is, for edits where a row has several instructions, one for each step.

    Raises:
        DataError: if it has other columns.
    """
    groups = _group_folders(opening)
    if groups:
        stores = [open_bagel(replace(opening, path=str(groups[kind]), kinds=(kind,))) for kind in groups]
        return stores[0] if len(stores) == 1 else JoinedStore(stores)
    files = row_files(opening, (".parquet",), in_place=True)
    columns = parquet_columns(files[0])
    rows = ParquetRows(files, columns)
    kind = "t2i"
    if "image_list" in columns:
        asked = {"edit", "multi_ref"} & set(opening.kinds)
        kind = asked.pop() if len(asked) == 1 else "edit" if _are_edits(rows) else "multi_ref"
    elif not {"image", "captions"} <= set(columns):
        raise DataError(f"{files[0]} has neither image and captions nor image_list; it has {', '.join(columns)}")
    return RecordStore(rows, FieldParser(ImageFinder(), opening.columns, only_kind=kind))


def _group_folders(opening: Opening) -> dict[str, Path]:
    """Kind → folder, of a data set with a folder for each group, as it is written here; without unwanted kinds."""
    path = local_or_url(opening.path)
    if isinstance(path, str) or not path.is_dir() or files_in(path, (".parquet",)):
        return {}
    return {
        kind: path / group
        for kind, group in _GROUPS.items()
        if files_in(path / group, (".parquet",)) and (not opening.kinds or kind in opening.kinds)
    }


def _are_edits(rows: ParquetRows) -> bool:
    """Told from the first rows: a chain has one instruction for every step."""
    for row in range(min(len(rows), 16)):
        values = rows.read(row)
        steps = values.get("instruction_list")
        if isinstance(steps, list) and len(steps) > 1 and len(steps) == len(values["image_list"] or ()) - 1:
            return True
    return False


def _recognise(path: Path) -> bool:
    if path.is_dir() and _group_folders(Opening(str(path))):
        return True
    columns = set(parquet_columns(path))
    return {"image", "captions"} <= columns or {"image_list", "instruction_list"} <= columns


FORMAT = Format(
    "bagel_parquet",
    "upstream BAGEL's parquet: t2i, edit, multi_ref",
    ("t2i", "edit", "multi_ref"),
    open_bagel,
    _recognise,
)
