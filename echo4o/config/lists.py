"""Settings that hold several values in one string: ``"gen,connector"`` and ``"lora_B=1e-4,vit_model=1e-5"``.

Flags are flat strings, so YAML's lists and mappings are brought into the same form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from echo4o.config.errors import ConfigError

#: Settings that are lists of names or patterns, and the one that maps patterns to learning rates.
NAMES = ("train_only", "lora_targets")
RATES = ("lr_groups",)


def in_one_string(name: str, value: Any, source: str) -> Any:
    """A YAML list or mapping of the setting `name` as the string a flag would hold; other values as they are.

    Raises:
        ConfigError: if an entry is not a name or pattern, or holds the comma that separates entries.
    """
    if name in NAMES and isinstance(value, (list, tuple)):
        return ",".join(_entry(name, entry, source) for entry in value) or None
    if name in RATES and isinstance(value, Mapping):
        return ",".join(f"{_entry(name, key, source)}={rate}" for key, rate in value.items()) or None
    if name in (*NAMES, *RATES) and isinstance(value, str):
        return ",".join(part.strip() for part in value.split(",") if part.strip())
    return value


def split_names(text: str | None) -> tuple[str, ...]:
    """``"gen, connector"`` → ``("gen", "connector")``."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def split_rates(text: str | None) -> dict[str, float]:
    """``"lora_B=1e-4,vit=1e-5"`` → pattern → learning rate, in order.

    Raises:
        ConfigError: if an entry has another form.
    """
    rates: dict[str, float] = {}
    for entry in split_names(text):
        pattern, equals, rate = entry.rpartition("=")  # a pattern may hold an equals sign, a rate cannot
        number = _number(rate)
        if not equals or not pattern.strip() or number is None:
            raise ConfigError(
                f"lr_groups has the entry {entry!r}; expected pattern=lr with lr greater than 0, such as "
                "lora_B=1e-4,connector=1e-5 (in YAML a mapping: {lora_B: 1.0e-4})"
            )
        rates[pattern.strip()] = number
    return rates


def invalid_patterns(name: str, patterns: tuple[str, ...]) -> list[str]:
    """What is wrong with regular expressions, a line each."""
    wrong = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            wrong.append(
                f"{name} has the pattern {pattern!r}, which is not a regular expression ({error}); a comma separates "
                "patterns and cannot be part of one"
            )
    return wrong


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _entry(name: str, entry: Any, source: str) -> str:
    if not isinstance(entry, str) or not entry.strip():
        raise ConfigError(f"{name} must list names or patterns, not {entry!r} ({source})")
    if "," in entry:
        raise ConfigError(
            f"{name} has the entry {entry!r} ({source}): a comma separates entries; make two patterns of it"
        )
    return entry.strip()
