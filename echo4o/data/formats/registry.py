"""All formats by name, and which of them a path is."""

from __future__ import annotations

from pathlib import Path

from echo4o.data.errors import DataError
from echo4o.data.formats import (
    bagel,
    blip3o,
    echo4o_image,
    folder,
    hf_dataset,
    macro,
    mico,
    nano_consistent,
    native,
    omnigen2,
    unireason,
)
from echo4o.data.formats.layout import parquet_columns
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore

__all__ = ["FORMATS", "Format", "FormatStore", "Opening", "RecordStore", "detect", "format_named"]

#: In the order in which `detect` asks: the most particular first.
FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        hf_dataset.FORMAT,
        echo4o_image.FORMAT,
        nano_consistent.FORMAT,
        macro.FORMAT,
        omnigen2.FORMAT,
        unireason.FORMAT,
        bagel.FORMAT,
        mico.FORMAT,
        blip3o.FORMAT,
        folder.FORMAT,
        native.FORMAT,
    )
}


def format_named(name: str) -> Format:
    """Raises DataError for an unknown name."""
    if name not in FORMATS:
        raise DataError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(path: str | Path) -> str:
    """Name of the format of a local path, told from names and first rows.

    Raises:
        DataError: if there is nothing, or nothing that is known; it lists what was found.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist")
    for fmt in FORMATS.values():
        if fmt.recognise(path):
            return fmt.name
    raise DataError(f"{path} is no data set of a known format. {_found(path)}\n  Known formats: {', '.join(FORMATS)}")


def _found(path: Path) -> str:
    if path.is_file():
        return f"It is a file of {path.stat().st_size} bytes."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    columns = parquet_columns(path)
    remedy = f" Its parquet has {', '.join(columns)}: name them as columns of hf_dataset." if columns else ""
    return f"Found there: {shown or 'nothing'}.{remedy}"
