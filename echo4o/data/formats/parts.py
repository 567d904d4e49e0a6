"""A conversion in parts: fixed spans of rows, each read and written by itself, so that any of them can be done anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.record import Record
from echo4o.data.formats.store import FormatStore
from echo4o.data.formats.workspace import Workspace, part_name
from echo4o.data.formats.writers import CannotHold, KindSummary, PartPlace, Target
from echo4o.data.formats.writers.image_files import suffix_of
from echo4o.data.sources.drafts import unreadable_row


@dataclass
class PartResult:
    """What became of the rows of one part, or of all.

    Attributes:
        rows: looked at, without those of unwanted kinds.
        image_bytes: written.
        kinds: what was written, by kind.
        bad: reason → rows that are broken.
        held_not: reason → good rows that the target has no place for.
        notes: what of written rows was left out or changed → rows.
        skipped: the bad rows and those that the target cannot hold, for the log.
    """

    rows: int = 0
    image_bytes: int = 0
    kinds: dict[str, KindSummary] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)
    held_not: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        return self.bad.total()

    @property
    def num_written(self) -> int:
        return sum(summary.rows for summary in self.kinds.values())

    def add(self, other: PartResult) -> None:
        """Sum up. The list of skipped rows is left out: it stays on the disk."""
        self.rows += other.rows
        self.image_bytes += other.image_bytes
        self.bad += other.bad
        self.held_not += other.held_not
        self.notes += other.notes
        for kind, summary in other.kinds.items():
            self.kinds.setdefault(kind, KindSummary()).add(summary)

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name != "kinds"},
            "kinds": {kind: vars(summary) for kind, summary in self.kinds.items()},
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PartResult:
        kinds = {}
        for kind, summary in values.pop("kinds").items():
            summary["files"] = {name: tuple(counts) for name, counts in summary["files"].items()}
            kinds[kind] = KindSummary(**summary)
        counters = {name: Counter(values.pop(name)) for name in ("bad", "held_not", "notes")}
        return cls(kinds=kinds, **counters, **values)


@dataclass(frozen=True)
class Job:
    """What all parts have in common. Travels into worker processes.

    Attributes:
        store: the source.
        target: what is written.
        workspace: where.
        spans: (first row, row after the last) of every part.
        kinds: wanted; empty for all.
        phrasings: ``all`` or ``first``.
    """

    store: FormatStore
    target: Target
    workspace: Workspace
    spans: Sequence[tuple[int, int]]
    kinds: tuple[str, ...]
    phrasings: str


def part_spans(unit_lengths: Sequence[int], rows_per_part: int, limit: int | None) -> list[tuple[int, int]]:
    """Spans of about `rows_per_part` rows.

    They end where a unit of the source does, so that no row group is read by two parts; units that are longer than a
    part are cut.
    """
    num_rows = sum(unit_lengths) if limit is None else min(limit, sum(unit_lengths))
    spans: list[tuple[int, int]] = []
    start = end = 0
    for length in unit_lengths:
        if end > start and end - start + length > rows_per_part:
            spans.append((start, end))
            start = end
        end += length
        while end - start >= rows_per_part:
            spans.append((start, start + rows_per_part))
            start += rows_per_part
    spans.append((start, end))
    return [(first, min(last, num_rows)) for first, last in spans if first < min(last, num_rows)]


def convert_part(job: Job, index: int, advance: Callable[[int, int], None]) -> Callable[[], None]:
    """Write a part.

    Args:
        advance: told rows and bytes of images that are done.

    Returns:
        What is left to do, and best done after the next part: wait for the disk and record the part as finished.

    Raises:
        DataError: if the source cannot be read at all.
        OSError: if writing fails.
    """
    workspace, result = job.workspace, PartResult()
    place = PartPlace(
        index, workspace.build, workspace.state, workspace.temp, workspace.final, job.phrasings, result.notes
    )
    writer = job.target.open_part(place)
    for row in range(*job.spans[index]):
        try:
            record = _wanted_record(job, row)
            if record is None:
                advance(1, 0)
                continue
            images = _contents(record)
            writer.add(record, images, row)
        except CannotHold as error:
            result.held_not[error.reason] += 1
            result.skipped.append(_skipped(job.store, row, error, "not held by the target"))
            num_bytes = 0
        except RowError as error:
            result.bad[error.reason] += 1
            result.skipped.append(_skipped(job.store, row, error, "bad"))
            num_bytes = 0
        else:
            num_bytes = sum(map(len, images))
        result.rows += 1
        result.image_bytes += num_bytes
        advance(1, num_bytes)
    result.kinds = writer.close()

    def settle() -> None:
        writer.settle()
        workspace.record(part_name(index), result.to_json(), durably=False)  # if it is lost, the part is done again

    return settle


def _wanted_record(job: Job, row: int) -> Record | None:
    """The row, unless it is of a kind that nobody asked for. Raises RowError."""
    try:
        if job.kinds and job.store.kind(row) not in job.kinds:
            return None
        record = job.store.record(row)
    except (RowError, DataError, OSError, MemoryError):
        raise
    except Exception as error:  # one odd row among millions must be counted, not end the conversion
        raise unreadable_row(error) from error
    if record.kind not in job.target.kinds:
        raise CannotHold(
            f"{record.kind} row", detail=f"{job.target.name} holds rows of kind {', '.join(job.target.kinds)}"
        )
    return record


def _contents(record: Record) -> list[bytes]:
    """All images of the row, target last. Raises RowError if one is missing or is no image."""
    if record.target is None and record.kind != "vlm":
        raise RowError("no images", detail="the row has no target")
    contents = []
    for image in record.images:
        content = image.read()
        suffix_of(content)
        contents.append(content)
    return contents


def _skipped(store: FormatStore, row: int, error: RowError, what: str) -> dict[str, Any]:
    file, number = store.where(row)
    return {"where": f"{file}:{number}", "what": what, "reason": error.reason, "detail": error.detail}
