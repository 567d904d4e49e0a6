"""Formats that a data set can be converted to, by name."""

from __future__ import annotations

from echo4o.data.errors import DataError
from echo4o.data.formats.writers import bagel, blip3o, native, omnigen2
from echo4o.data.formats.writers.base import CannotHold, Finishing, KindSummary, PartPlace, PartWriter, Target

__all__ = ["TARGETS", "CannotHold", "Finishing", "KindSummary", "PartPlace", "PartWriter", "Target", "target_named"]

TARGETS: dict[str, Target] = {
    target.name: target for target in (bagel.TARGET, native.TARGET, omnigen2.TARGET, blip3o.TARGET)
}


def target_named(name: str) -> Target:
    """Raises DataError for an unknown name."""
    if name not in TARGETS:
        raise DataError(f"cannot convert to {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
