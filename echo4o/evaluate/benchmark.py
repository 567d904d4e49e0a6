"""What a benchmark is: things to draw, questions to a judge, and the formulas that make scores of the answers.

One file a benchmark in `echo4o.evaluate.benchmarks`; drawing, judging and reporting are the same for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from echo4o.evaluate.parsing import Answer

Status = Literal["ok", "missing_image", "api_error", "parse_error"]
#: Of an item; ``not_judged``: nobody has asked yet.
ItemStatus = Literal["ok", "missing_image", "api_error", "parse_error", "not_judged"]
FAILURES: tuple[ItemStatus, ...] = ("missing_image", "not_judged", "api_error", "parse_error")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RESULT: Literal["result"] = "result"


@dataclass(frozen=True)
class Item:
    """One thing to draw and judge.

    Attributes:
        id: unique in the benchmark, safe as a file name.
        prompt: as the model reads it.
        references: in order; shown to the model, and to the judge where the protocol says so.
        tag: type, task or category as in the data.
        fields: everything else of the row.
        num_images: how many pictures the protocol wants of it.
    """

    id: str
    prompt: str
    references: tuple[Path, ...] = ()
    tag: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    num_images: int = 1


@dataclass(frozen=True)
class JudgeImage:
    """An image in a question and how it is prepared: EXIF orientation, RGB, sizes in the order below, JPEG.

    Attributes:
        path: a file, or ``result``: the picture drawn for the item.
        number: which of the item's pictures.
        max_pixels: shrink by √(max_pixels / pixels) if it has more.
        max_side: shrink to this longest side if it is longer.
        stride: each side down to a multiple of it.
        size_of: resize to exactly the size of this file.
        quality: of the JPEG; 75 is PIL's default.
        detail: as the API calls it.
    """

    path: Path | Literal["result"] = RESULT
    number: int = 0
    max_pixels: int | None = None
    max_side: int | None = None
    stride: int = 1
    size_of: Path | None = None
    quality: int = 75
    detail: Literal["auto", "low", "high"] = "auto"


@dataclass(frozen=True)
class Question:
    """One call to the judge.

    Attributes:
        name: unique within the item, for example ``verdict`` or ``PF``.
        system: system message; "" for none.
        parts: texts and images of the user's message, in order.
        answer: what the reply holds: gives the JSON schema and reads the reply.
        max_tokens: of the reply.
    """

    name: str
    system: str
    parts: tuple[str | JudgeImage, ...]
    answer: Answer
    max_tokens: int = 1024


@dataclass(frozen=True)
class Judgement:
    """One line of ``judgements.jsonl``.

    Attributes:
        question: the name of the question.
        answer: what was read, None unless `status` is ok.
        text: the reply as it came.
        error: why there is no answer, without secrets.
        judge: the model's name as pinned.
        request: hash of all that determines the question, bytes of the images included.
        usage: ``prompt_tokens`` and ``completion_tokens``.
        attempts: calls made, retries included.
    """

    benchmark: str
    item: str
    question: str
    status: Status
    answer: dict[str, Any] | None = None
    text: str | None = None
    error: str | None = None
    judge: str = ""
    request: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class ItemScore:
    """One item's score, in the benchmark's scale.

    Attributes:
        published: as upstream's script counts it; None where it leaves the item out.
        strict: missing images and judgements count as the lowest score.
        parts: components, for example PF and SC.
        status: of the worst of its judgements.
    """

    item: str
    tag: str
    published: float | None
    strict: float
    parts: Mapping[str, float] = field(default_factory=dict)
    status: ItemStatus = "ok"


@dataclass(frozen=True)
class TagScore:
    """Scores of one tag: `n` items, of which `failed` have no judgement and `missing` (not in `failed`) no image."""

    published: float | None
    strict: float
    n: int
    failed: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Aggregates:
    """Scores of a run.

    Attributes:
        published: by upstream's formula; None if no item counts.
        strict: by the same weights over all items.
        per_tag: in the benchmark's order.
        others: further totals by name, for example ``average_of_6``.
        notes: what a reader must know about these numbers.
    """

    published: float | None
    strict: float
    per_tag: Mapping[str, TagScore]
    n: int = 0
    failed: int = 0
    missing: int = 0
    others: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Benchmark(ABC):
    """Items, questions and formulas of one benchmark.

    Attributes:
        name: on the command line.
        title: in reports.
        scale: ``0-1``, ``0-10``, ``1-5`` or ``percent``, of item scores and totals.
        settings: of drawing, with the keys of a line of requests: ``preset``, every setting, ``height``, ``width``;
            without a size the references decide (``size_from``).
        judge: the model the published scores were judged with; None if a program of its own judges.
        published_rows: published totals by model, in `scale`.
        caveats: sentences for the report.
        source: where the data comes from, for messages and documentation.
        tags: in the order of reports; others follow as they come.
        lowest: of the scale; what a missing item counts in `strict`.
        num_items: of the official data; None if it is not known.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    scale: ClassVar[str] = "0-1"
    judge: ClassVar[str | None] = None
    published_rows: ClassVar[Mapping[str, float]] = {}
    caveats: ClassVar[Sequence[str]] = ()
    source: ClassVar[str] = ""
    tags: ClassVar[Sequence[str]] = ()
    lowest: ClassVar[float] = 0.0
    num_items: ClassVar[int | None] = None

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]: ...

    @abstractmethod
    def load(self, path: Path | None) -> list[Item]:
        """Every item, in the data's order.

        Args:
            path: the data on disk; None fetches it from the hub where it is published there.

        Raises:
            BenchmarkDataError: naming the row and what was expected.
        """

    def image_name(self, item: Item, number: int = 0) -> str:
        """Where picture `number` lies under ``images/``, with suffix; `find_image` accepts other suffixes."""
        return f"{item.id}.png" if item.num_images == 1 else f"{item.id}_{number}.png"

    def sidecars(self, item: Item) -> Mapping[str, str | Path]:
        """Files under ``images/`` that upstream's scorer wants beside the pictures: name → text, or a file to copy."""
        return {}

    def questions(self, item: Item) -> list[Question]:
        """What the judge is asked about the item; empty if a program of its own judges."""
        return []

    @abstractmethod
    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """The item's score from its judgements by question name; those not made yet are absent."""

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """Totals by the published and the strict formula: weighted means of the tags' means."""
        per_tag = tag_scores(scores, self.tags)
        counted = Counter(score.tag for score in scores if score.published is not None)
        published = {tag: one.published for tag, one in per_tag.items() if one.published is not None}
        strict = {tag: one.strict for tag, one in per_tag.items()}
        return Aggregates(
            published=weighted_mean(published, self.weights(counted)) if published else None,
            strict=weighted_mean(strict, self.weights({tag: one.n for tag, one in per_tag.items()})),
            per_tag=per_tag,
            n=len(scores),
            failed=sum(one.failed for one in per_tag.values()),
            missing=sum(one.missing for one in per_tag.values()),
            notes=self._notes(scores),
        )

    @abstractmethod
    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """Weight of each tag's mean in the total (any sum), from the number of its items."""

    def _notes(self, scores: Sequence[ItemScore]) -> list[str]:
        """What makes these scores less than a complete run."""
        notes = []
        if self.num_items is not None and len(scores) != self.num_items:
            notes.append(f"{len(scores)} of {self.num_items} items: not comparable with published scores")
        of_status = Counter(score.status for score in scores)
        if count := of_status["missing_image"]:
            notes.append(f"{count} without an image: {self.lowest:g} each in the strict score")
        if count := of_status["not_judged"]:
            notes.append(f"{count} not judged yet: {self.lowest:g} each in the strict score")
        if count := of_status["api_error"] + of_status["parse_error"]:
            notes.append(f"{count} judged without result: {self.lowest:g} each in the strict score; judge them again")
        return notes

    def read_results(self, path: Path, items: Sequence[Item]) -> list[ItemScore]:
        """Scores from the file that the benchmark's own scorer wrote.

        Raises:
            BenchmarkDataError: if the benchmark has no such scorer, or the file does not fit the items.
        """
        raise BenchmarkDataError(f"{self.title} is judged by questions to a model; it has no results of a scorer")


class BenchmarkDataError(ValueError):
    """A benchmark's data or results cannot be read; the message names place, finding and remedy."""


def find_image(folder: Path, name: str) -> Path | None:
    """The picture called `name` in `folder`, with its suffix or another of `IMAGE_SUFFIXES` in that order."""
    wanted = folder / name
    if wanted.is_file():
        return wanted
    others = (wanted.with_name(wanted.stem + suffix) for suffix in IMAGE_SUFFIXES)
    return next((path for path in others if path.is_file()), None)


def tag_scores(scores: Sequence[ItemScore], order: Sequence[str] = ()) -> dict[str, TagScore]:
    """Means by tag: those of `order` first, as far as they occur."""
    by_tag: dict[str, list[ItemScore]] = {tag: [] for tag in order}
    for score in scores:
        by_tag.setdefault(score.tag, []).append(score)
    result = {}
    for tag, group in by_tag.items():
        if not group:
            continue
        published = [score.published for score in group if score.published is not None]
        missing = sum(score.status == "missing_image" for score in group)
        result[tag] = TagScore(
            published=math.fsum(published) / len(published) if published else None,
            strict=math.fsum(score.strict for score in group) / len(group),
            n=len(group),
            failed=sum(score.status != "ok" for score in group) - missing,
            missing=missing,
        )
    return result


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Σ w·v / Σ w over the names of `values`.

    Raises:
        ValueError: if no weight is above 0.
    """
    total = math.fsum(weights[name] for name in values)
    if not total > 0:
        raise ValueError(f"nothing to average: weights {dict(weights)} of {sorted(values)}")
    return math.fsum(weights[name] * value for name, value in values.items()) / total


def failure(judgements: Mapping[str, Judgement], names: Iterable[str]) -> ItemStatus:
    """The first of `FAILURES` among the judgements called `names`; ok if all are there and ok."""
    found = {judgements[name].status if name in judgements else "not_judged" for name in names}
    for status in FAILURES:
        if status in found:
            return status
    return "ok"
