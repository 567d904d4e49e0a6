"""Types of values in the dataset YAML. Nothing is converted: ``'false'`` is no boolean and 16.0 no whole number."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from echo4o.data.errors import DataError


def whole(value: Any, place: str, at_least: int = 1) -> int:
    """A whole number. Raises DataError, naming `place` (``group.key``), for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise wrong(value, place, "a positive whole number" if at_least == 1 else f"a whole number from {at_least}")
    return value


def share(value: Any, place: str) -> float:
    """A finite number that is not negative. Raises DataError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(value, place, "a number such as 1 or 0.5")
    if value < 0:
        raise DataError(f"{place} must not be negative: {value}")
    return float(value)


def probability(value: Any, place: str) -> float:
    """A number from 0 to 1. Raises DataError for anything else."""
    number = share(value, place)
    if number > 1:
        raise DataError(f"{place} in the dataset config is {number:g}; it lies between 0 and 1")
    return number


def boolean(value: Any, place: str) -> bool:
    """True or False. Raises DataError for anything else, quoted words included."""
    if not isinstance(value, bool):
        raise wrong(value, place, "true or false, without quotes")
    return value


def check_type(value: Any, annotation: str, place: str) -> None:
    """Raises DataError unless a value is of a plain annotation (int, bool, str or one of these ``| None``).

    Other annotations are left to the class they belong to.
    """
    names = annotation.split(" | ")
    if value is None and "None" in names:
        return
    kinds = {"int": (int, "a whole number"), "bool": (bool, "true or false, without quotes"), "str": (str, "text")}
    if names[0] not in kinds:
        return
    kind, expected = kinds[names[0]]
    if type(value) is not kind:
        raise wrong(value, place, expected)


def check_key(key: Any, known: Iterable[str], what: str) -> None:
    """Raises DataError, naming the nearest known key, unless a key is known."""
    names = [str(name) for name in known]
    if key in names:
        return
    close = difflib.get_close_matches(str(key), names, n=1)
    raise DataError(f"unknown {what}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"))


def wrong(value: Any, place: str, expected: str) -> DataError:
    return DataError(f"{place} in the dataset config must be {expected}, not {value!r}")
