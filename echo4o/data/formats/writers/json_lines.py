"""Rows of JSON, one file for each kind. Every part writes its lines; the end joins them in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import Finishing, KindSummary, PartPlace

_CHUNK_BYTES = 1 << 20


class LinesPart:
    """Lines of one part, by kind."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._summaries: dict[str, KindSummary] = {}
        self._lines: dict[str, list[str]] = {}

    def add(self, record: Record, *rows: Mapping[str, Any]) -> None:
        """The lines of one record."""
        self._lines.setdefault(record.kind, []).extend(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        summary = self._summaries.setdefault(record.kind, KindSummary())
        for _ in rows:
            summary.count(record)

    def close(self) -> dict[str, KindSummary]:
        for kind, lines in self._lines.items():
            with self._place.temporary(f"{kind}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
        return self._summaries

    def settle(self) -> None:
        for kind in self._lines:
            unfinished = self._place.temporary(f"{kind}.jsonl")
            self._place.settle(unfinished, _part(self._place.state, kind, self._place.index))


def join_lines(finishing: Finishing, kind: str, name: str) -> None:
    """All lines of a kind as one file of the data set."""
    finishing.write(name, _chunks(finishing, kind))


def _chunks(finishing: Finishing, kind: str) -> Iterator[bytes]:
    for index in range(finishing.num_parts):
        path = _part(finishing.state, kind, index)
        if not path.exists():  # a part without rows of the kind
            continue
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def _part(state: Path, kind: str, index: int) -> Path:
    return state / "lines" / kind / f"{index:06d}.jsonl"
