"""Upstream BAGEL's parquet: ``image`` + ``captions`` (t2i), ``image_list`` + ``instruction_list`` (edit, multi_ref)."""

from __future__ import annotations

from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder
from echo4o.data.formats.layout import parquet_columns, row_files
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.parquet import ParquetRows


def open_bagel(opening: Opening) -> FormatStore:
    """A parquet file or a folder of them.

    Edit and multi-reference files have the same columns. A data set is taken for edits where edits are asked for
    (`kinds`) or a row has as many instructions as steps (more than one); otherwise for multi-reference rows.
    """
    files = row_files(opening, (".parquet",))
    columns = parquet_columns(files[0])
    parser = FieldParser(ImageFinder(), opening.columns, only_kind="t2i")
    rows = ParquetRows(files, columns)
    if "image_list" in columns:
        edits = "edit" in opening.kinds if opening.kinds else _are_edits(rows)
        parser = FieldParser(ImageFinder(), opening.columns, only_kind="edit" if edits else "multi_ref")
    elif "image" not in columns or "captions" not in columns:
        raise DataError(f"{files[0]} has neither image and captions nor image_list; it has {', '.join(columns)}")
    return RecordStore(rows, parser)


def _are_edits(rows: ParquetRows) -> bool:
    """Told from the first rows: a chain has one instruction for every step."""
    for row in range(min(len(rows), 16)):
        values = rows.read(row)
        steps = values.get("instruction_list")
        if isinstance(steps, list) and len(steps) > 1 and len(steps) == len(values["image_list"] or ()) - 1:
            return True
    return False


def _recognise(path: Path) -> bool:
    columns = parquet_columns(path)
    return {"image", "captions"} <= set(columns) or {"image_list", "instruction_list"} <= set(columns)


FORMAT = Format(
    "bagel_parquet",
    "upstream BAGEL's parquet: t2i, edit, multi_ref",
    ("t2i", "edit", "multi_ref"),
    open_bagel,
    _recognise,
)
