"""Read values out of raw rows: aliases, nestings, and one clear reason where a row lacks what it needs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from echo4o.data.errors import RowError

INSTRUCTION = ("instruction_list", "instruction", "prompt", "text")
INPUT_IMAGES = ("input_images", "input_image", "image_list", "images", "image")
OUTPUT_IMAGE = ("output_image", "target_image", "output")
IMAGE_LIST = ("image_list", "images", "image")


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first alias that the row has a value for; ("", None) if there is none."""
    return next(((name, row[name]) for name in names if row.get(name) is not None), ("", None))


def as_list(value: Any) -> list[Any]:
    """A column that may hold one entry or several."""
    return list(value) if isinstance(value, list | tuple) else [value]


def pick_phrase(value: Any, rng: random.Random) -> str:
    """One phrase of a string or a list of paraphrases.

    Raises:
        RowError: if there is none, or it is no text.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise RowError("instruction missing", detail="empty list")
        value = rng.choice(value)
    if value is None:
        raise RowError("instruction missing")
    if not isinstance(value, str):
        raise RowError("wrong column type", detail=f"an instruction is {type(value).__name__}, not text")
    return value


def instruction_of(row: Mapping[str, Any], rng: random.Random) -> str:
    """The instruction of a row, in any of the nestings in use.

    ``instruction_list`` is a string, a list of strings (the first counts) or a list of lists of paraphrases (one of the
    first list, drawn from `rng`); the other aliases hold a string or a list of paraphrases.

    Raises:
        RowError: if it is missing, empty or no text.
    """
    name, value = first_of(row, INSTRUCTION)
    if name == "instruction_list" and isinstance(value, list | tuple):
        value = value[0] if value else None
    text = pick_phrase(value, rng)
    if not text.strip():
        raise RowError("instruction missing", detail="empty text")
    return text


def references_and_target(row: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Reference images in order, and the target: named apart, or in one list with the target last.

    Raises:
        RowError: if the row has no images.
    """
    name, target = first_of(row, OUTPUT_IMAGE)
    _, images = first_of(row, INPUT_IMAGES if target is not None else IMAGE_LIST)
    images = [] if images is None else as_list(images)
    if isinstance(target, list | tuple):
        if len(target) != 1:
            raise RowError("wrong column type", detail=f"{name} holds {len(target)} images; a row has one target")
        target = target[0]
    elif target is None and images:
        *images, target = images
    if target is None:
        raise RowError("no images", detail=columns_found(row))
    return images, target


def columns_found(row: Mapping[str, Any]) -> str:
    """For messages about rows that lack one."""
    return f"columns with values: {', '.join(str(name) for name in row if row[name] is not None) or 'none'}"
