"""Plurals of COCO's class names."""

from __future__ import annotations

import re

_IRREGULAR = {
    "person": "people",
    "mouse": "mice",
    "knife": "knives",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "scissors",
    "broccoli": "broccoli",
}


def plural(name: str) -> str:
    """``hot dog`` → ``hot dogs``, ``wine glass`` → ``wine glasses``, ``computer mouse`` → ``computer mice``."""
    head, space, last = name.rpartition(" ")
    if last in _IRREGULAR:
        return head + space + _IRREGULAR[last]
    if re.search(r"(s|x|z|ch|sh)$", last):
        return f"{name}es"
    if re.search(r"[^aeiou]y$", last):
        return f"{name[:-1]}ies"
    return f"{name}s"
