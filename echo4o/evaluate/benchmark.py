"""What a benchmark is: things to draw, questions to a judge, and the formulas that make scores of the answers.

One file a benchmark in `echo4o.evaluate.benchmarks`; drawing, judging and reporting are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """

    name: ClassVar[str]
    title: ClassVar[str]
    scale: ClassVar[str] = "0-1"
    judge: ClassVar[str | None] = None
    published_rows: ClassVar[Mapping[str, float]] = {}
    caveats: ClassVar[Sequence[str]] = ()
    source: ClassVar[str] = ""

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

    @abstractmethod
    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """Totals by the published and the strict formula."""

    @abstractmethod
    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """Weight of each tag's mean in the total (any sum), from the number of its items."""

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


def failure(judgements: Mapping[str, Judgement], names: Iterable[str]) -> ItemStatus:
    """The first of `FAILURES` among the judgements called `names`; ok if all are there and ok."""
    found = {judgements[name].status if name in judgements else "not_judged" for name in names}
    for status in FAILURES:
        if status in found:
            return status
    return "ok"
