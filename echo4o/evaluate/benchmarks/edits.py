"""What benchmarks of editing have in common: a folder with a list of edits and their source images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.rows import field, inside

#: Published settings of BAGEL's scripts for edits (SPEC.md §6.6); the picture takes the size of its source.
EDIT_SETTINGS = {"preset": "edit", "cfg_img_scale": 1.5}


def source_images(row: dict[str, Any], key: str, folder: Path, place: str) -> tuple[Path, ...]:
    """The files that ``row[key]`` names, one or several, in order.

    Raises:
        BenchmarkDataError: if one is missing, or there are none.
    """
    value = field(row, key, (str, list), place)
    names: Sequence[Any] = [value] if isinstance(value, str) else value
    if not names or not all(isinstance(name, str) and name for name in names):
        raise BenchmarkDataError(f"{place}: {key!r} names no images")
    return tuple(inside(folder, name, place) for name in names)
