"""Rows looked at as training would look at them: planned, decoded, hashed. In worker processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from echo4o.data.errors import DataError, RowError
from echo4o.data.inspection.stats import references_of
from echo4o.data.sources.base import RowPlan, SourceGroup

#: Rows that a worker process takes at once: neighbours in the order of training, which share files.
_SPAN = 64
#: Bits of a perceptual hash.
HASH_BITS = 64


@dataclass(frozen=True)
class RowFacts:
    """What was found out about a row.

    Attributes:
        file, row: where it lies.
        name: of its data set.
        num_tokens: packed length when nothing is dropped; 0 if it cannot be planned.
        num_references: reference images.
        sizes: (width, height) of its distinct images, upright; the targets last.
        digests: of the images' encoded bytes, in the same order.
        num_targets: how many of them are targets.
        near: perceptual hash of the last target; None where it was not decoded or there is no library for it.
        text: digest of the texts.
        is_empty_text: a text has no token.
        reason, detail: of what makes it unusable; empty if nothing does.
    """

    file: str
    row: int
    name: str
    num_tokens: int = 0
    num_references: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    digests: tuple[bytes, ...] = ()
    num_targets: int = 0
    near: int | None = None
    text: bytes = b""
    is_empty_text: bool = False
    reason: str = ""
    detail: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.row}"

    @property
    def targets(self) -> tuple[bytes, ...]:
        return self.digests[len(self.digests) - self.num_targets :]

    @property
    def references(self) -> tuple[bytes, ...]:
        return self.digests[: len(self.digests) - self.num_targets]


@dataclass
class _Task:
    """What a worker process needs; inherited, not sent."""

    groups: Sequence[SourceGroup]
    decode: bool
    near: Callable[[Image.Image], int] | None = None


@dataclass
class _Looked:
    digests: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


_TASK: list[_Task] = []


def examine_rows(
    groups: Sequence[SourceGroup], *, sample: int | None = None, workers: int = 1, decode: bool = True
) -> Iterator[tuple[str, list[RowFacts]]]:
    """Yields (group, facts of some rows) until every row, or `sample` rows of each group, were looked at.

    Args:
        sample: rows of each group, spread over the order of the first epoch; None: all.
        workers: processes; 1 works in this one.
        decode: decode every picture, instead of reading its header only.
    """
    task = _Task(groups, decode, perceptual_hash() if decode else None)
    spans = [(number, *span) for number, group in enumerate(groups) for span in _spans(len(group.source), sample)]
    if workers <= 1 or sys.platform == "win32":
        for span in spans:
            yield groups[span[0]].name, _look_at_span(task, span)
        return
    _TASK.append(task)
    try:
        # Stores are open and indexed already: a forked worker inherits them.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for number, facts in pool.imap(_in_worker, spans):
                yield groups[number].name, facts
    finally:
        _TASK.pop()


def _in_worker(span: tuple[int, int, int]) -> tuple[int, list[RowFacts]]:
    return span[0], _look_at_span(_TASK[-1], span)


def _spans(num_rows: int, sample: int | None) -> list[tuple[int, int]]:
    """Runs of positions: all, or short ones spread evenly."""
    if sample is None or sample >= num_rows:
        return [(start, min(start + _SPAN, num_rows)) for start in range(0, num_rows, _SPAN)]
    length = min(8, sample)
    count = -(-sample // length)
    starts = [place * (num_rows - length) // max(1, count - 1) for place in range(count)]
    return [(start, start + length) for start in dict.fromkeys(starts)]


def _look_at_span(task: _Task, span: tuple[int, int, int]) -> list[RowFacts]:
    number, start, stop = span
    group = task.groups[number]
    return [_look_at(task, group, position) for position in range(start, stop)]


def _look_at(task: _Task, group: SourceGroup, position: int) -> RowFacts:
    try:
        plan = group.source.plan(0, position)
    except RowError as error:
        return RowFacts(error.file, error.row or 0, group.name, reason=error.reason, detail=error.detail)
    file, _, row = plan.row.rpartition(":")
    try:
        return _facts(task, plan, file, int(row))
    except RowError as error:
        return RowFacts(
            file, int(row), plan.name, plan.num_tokens, references_of(plan), reason=error.reason, detail=error.detail
        )
    except DataError:
        raise
    except Exception as error:  # one odd row must be reported, not end the examination
        detail = f"{type(error).__name__}: {error}"
        return RowFacts(file, int(row), plan.name, plan.num_tokens, reason="row unreadable", detail=detail)


def _facts(task: _Task, plan: RowPlan, file: str, row: int) -> RowFacts:
    references, targets, seen, near = _Looked(), _Looked(), set(), None
    for segment in plan.segments:
        picture: Any = getattr(segment, "picture", None)
        if picture is None or id(picture) in seen:
            continue
        seen.add(id(picture))
        is_target = bool(getattr(segment, "loss", False))
        looked = targets if is_target else references
        looked.sizes.append(picture.size)
        data = getattr(picture, "data", None)
        if data is not None:
            looked.digests.append(_digest(data))
        if task.decode:
            image = picture.decode()
            if is_target and task.near is not None:
                near = task.near(image)
    texts = [segment for segment in plan.segments if segment.kind == "text"]
    ids = b"\0".join(np.asarray(getattr(text, "text_ids", ()), dtype=np.int64).tobytes() for text in texts)
    return RowFacts(
        file,
        row,
        plan.name,
        plan.num_tokens,
        references_of(plan),
        (*references.sizes, *targets.sizes),
        (*references.digests, *targets.digests),
        len(targets.digests),
        near,
        hashlib.blake2b(ids, digest_size=12).digest(),
        any(not len(getattr(text, "text_ids", ())) for text in texts) or not texts,
    )


def _digest(data: bytes | Path) -> bytes:
    return hashlib.blake2b(data if isinstance(data, bytes) else Path(data).read_bytes(), digest_size=16).digest()


@lru_cache(maxsize=1)
def perceptual_hash() -> Callable[[Image.Image], int] | None:
    """A function that gives a picture's 64-bit perceptual hash; None where imagehash is not installed."""
    try:
        import imagehash
    except ImportError:
        return None

    def near(image: Image.Image) -> int:
        bits = imagehash.phash(image).hash.flatten()
        return int("".join("1" if bit else "0" for bit in bits), 2)

    return near
