"""MICo-150K and Scone: parquet of ``image_list`` or ``image`` (references in order, the target last) and
``instruction``, a plain text."""

from __future__ import annotations

from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder
from echo4o.data.formats.layout import parquet_columns, row_files
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.columns import INPUT_IMAGES, INSTRUCTION
from echo4o.data.sources.parquet import ParquetRows


def open_mico(opening: Opening) -> FormatStore:
    """A parquet file, a folder of them at any depth, or a URL, which is read in place.

    Raises:
        DataError: if the files have no list of images or no instruction.
    """
    files = row_files(opening, (".parquet",), deep=True, in_place=True)
    columns = parquet_columns(files[0])
    if not opening.columns and not (set(columns) & set(INPUT_IMAGES) and set(columns) & set(INSTRUCTION)):
        raise DataError(f"{files[0]} has no image_list or no instruction; it has {', '.join(columns)}")
    parser = FieldParser(ImageFinder(), opening.columns, only_kind="multi_ref")
    return RecordStore(ParquetRows(files, columns), parser)


def _recognise(path: Path) -> bool:
    columns = set(parquet_columns(path))
    return bool(columns & {"image_list", "image", "images"}) and bool(columns & {"instruction", "prompt"})


FORMAT = Format(
    "mico",
    "MICo-150K, Scone: parquet of image_list (target last) and instruction",
    ("multi_ref",),
    open_mico,
    _recognise,
)
