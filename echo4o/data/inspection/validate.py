"""``echo4o data validate PATH|CONFIG``: what is wrong with data before a run is spent on it, and how to mend it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from echo4o.data.inspection.duplicates import exact_groups, near_groups
from echo4o.data.inspection.examine import RowFacts, examine_rows, perceptual_hash
from echo4o.data.inspection.opening import Opened
from echo4o.data.inspection.remedies import remedy_for

#: Places named in a finding.
_SHOWN = 5
#: Sides of 1 to this are usual; beyond, the resize rule ends below its minimum.
_LONG_SIDE = 4.0


@dataclass(frozen=True)
class DataFinding:
    """Something that was found in rows.

    Attributes:
        level: ``error`` (rows that training skips, or data that teaches something wrong), ``warning`` or ``note``.
        what: in words, with the number of rows.
        fix: what to do.
        count: rows.
        where: some of them, ``file:row``, rows counted from 0.
    """

    level: str
    what: str
    fix: str
    count: int
    where: tuple[str, ...] = ()


@dataclass
class FileReport:
    """What a file of rows holds.

    Attributes:
        rows: that were looked at.
        usable: of them.
        references: number of reference images → rows.
        sizes: least, median and largest width × height of an image, in pixels.
        longest_side_ratio: largest ratio of an image's sides.
        tokens: least, median, 95th percentile and largest of a row.
        too_long: rows longer than the config allows.
    """

    file: str
    rows: int = 0
    usable: int = 0
    references: dict[int, int] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    longest_side_ratio: float = 0.0
    tokens: tuple[int, ...] = ()
    too_long: int = 0


@dataclass
class DataReport:
    """The whole examination.

    Attributes:
        complete: every row was looked at, not a sample.
        decoded: pictures were decoded.
        max_num_tokens_per_sample: of the config, beyond which rows are skipped.
    """

    title: str
    rows: int
    usable: int
    complete: bool
    decoded: bool
    max_num_tokens_per_sample: int
    files: list[FileReport]
    findings: list[DataFinding]

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)


def validate(
    opened: Opened, *, sample: int | None = None, workers: int = 1, decode: bool = True, near: bool = True
) -> DataReport:
    """Look at all rows (or `sample` of each group) as training would.

    Args:
        workers: processes.
        decode: decode pictures; otherwise only their headers are read.
        near: look for targets that are the same to the eye (needs imagehash).

    Raises:
        DataError: if the data cannot be read at all.
    """
    facts: list[RowFacts] = []
    total = sum(len(g.source) if sample is None else min(sample, len(g.source)) for g in opened.groups)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("looking at rows", total=total)
        for _, found in examine_rows(opened.groups, sample=sample, workers=workers, decode=decode):
            facts += found
            progress.advance(task, len(found))
    limit = opened.max_num_tokens_per_sample
    files = [_file_report(file, rows, limit) for file, rows in _by_file(facts)]
    num_rows = sum(len(group.source) for group in opened.groups)
    findings = [DataFinding("warning", line, "see the message", 1) for line in opened.problems]
    findings += [*_unusable(facts), *_too_long(facts, opened), *_doubtful(facts), *_repeated(facts, decode and near)]
    order = {"error": 0, "warning": 1, "note": 2}
    return DataReport(
        opened.title,
        len(facts),
        sum(not row.reason for row in facts),
        len(facts) >= num_rows,
        decode,
        limit,
        files,
        sorted(findings, key=lambda finding: order[finding.level]),
    )


def _by_file(facts: Sequence[RowFacts]) -> list[tuple[str, list[RowFacts]]]:
    files: dict[str, list[RowFacts]] = defaultdict(list)
    for row in facts:
        files[row.file].append(row)
    return sorted(files.items())


def _file_report(file: str, rows: Sequence[RowFacts], limit: int) -> FileReport:
    sizes = sorted((size for row in rows for size in row.sizes), key=lambda size: size[0] * size[1])
    tokens = sorted(row.num_tokens for row in rows if row.num_tokens)
    return FileReport(
        file,
        rows=len(rows),
        usable=sum(not row.reason for row in rows),
        references=dict(sorted(Counter(row.num_references for row in rows if not row.reason).items())),
        sizes=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (),
        longest_side_ratio=max((max(size) / min(size) for size in sizes), default=0.0),
        tokens=(tokens[0], tokens[len(tokens) // 2], _percentile(tokens), tokens[-1]) if tokens else (),
        too_long=sum(number > limit for number in tokens),
    )


def _percentile(values: Sequence[int]) -> int:
    return round(quantiles(values, n=20)[-1]) if len(values) > 1 else values[0]


def _unusable(facts: Sequence[RowFacts]) -> list[DataFinding]:
    """A finding for each reason for which training would skip rows."""
    reasons: dict[str, list[RowFacts]] = defaultdict(list)
    for row in facts:
        if row.reason:
            reasons[row.reason].append(row)
    return [
        DataFinding(
            "error",
            f"{_rows(len(rows))} cannot be used: {reason}" + (f" ({rows[0].detail})" if rows[0].detail else ""),
            remedy_for(reason),
            len(rows),
            _places(rows),
        )
        for reason, rows in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]


def _too_long(facts: Sequence[RowFacts], opened: Opened) -> list[DataFinding]:
    limit = opened.max_num_tokens_per_sample
    usable = [row for row in facts if not row.reason]
    long = [row for row in usable if row.num_tokens > limit]
    if not long:
        return []
    need = max(row.num_tokens for row in long)
    share = len(long) / len(usable)
    refs = max(row.num_references for row in long)
    return [
        DataFinding(
            "error" if share > 0.5 else "warning",
            f"{_rows(len(long))} ({share:.1%}) are longer than {limit:,} tokens and would be skipped; the longest has "
            f"{need:,} ({refs} references)",
            f"--max_num_tokens_per_sample {need} --max_num_tokens {max(need, opened.limits.max_num_tokens)} keeps them "
            "all; so do smaller references (max_pixels_by_num_refs), or a smaller max_image_size",
            len(long),
            _places(long),
        )
    ]


def _doubtful(facts: Sequence[RowFacts]) -> list[DataFinding]:
    usable = [row for row in facts if not row.reason]
    kinds = (
        (
            "error",
            [row for row in usable if set(row.targets) & set(row.references)],
            "the target is one of the references, which teaches to copy",
            "remove these rows, or correct the order of their images (the target comes last)",
        ),
        (
            "error",
            [row for row in usable if row.is_empty_text],
            "an empty text",
            "write an instruction, or remove these rows; dropout for guidance is set with text_cond_dropout_prob",
        ),
        (
            "warning",
            [row for row in usable if len(set(row.references)) < len(row.references)],
            "the same reference twice",
            "remove the copy, and its number from the instruction",
        ),
        (
            "warning",
            [row for row in usable if any(max(size) > _LONG_SIDE * min(size) for size in row.sizes)],
            f"an image is more than {_LONG_SIDE:g} times as long as wide; resizing shrinks it below min_image_size",
            "crop these images",
        ),
    )
    return [
        DataFinding(level, f"{_rows(len(r))}: {what}", fix, len(r), _places(r)) for level, r, what, fix in kinds if r
    ]


def _repeated(facts: Sequence[RowFacts], near: bool) -> list[DataFinding]:
    usable = [row for row in facts if not row.reason and row.targets]
    rows = exact_groups((b"".join((*row.digests, row.text)), row.where) for row in usable)
    targets = exact_groups((row.targets[-1], row.where) for row in usable)
    findings = []
    if rows:
        findings.append(_copies("warning", rows, "copies of another row (same images, same text)", "remove them"))
    same_rows = {place for group in rows for place in group}
    other_targets = [group for group in targets if not set(group) <= same_rows]
    if other_targets:
        what = "the target of another row"
        findings.append(_copies("note", other_targets, what, "intended where texts are paraphrases; else remove them"))
    if not near:
        return findings
    if perceptual_hash() is None:
        note = "targets that are the same to the eye were not looked for"
        return [*findings, DataFinding("note", note, "pip install imagehash", 0)]
    exact = {place for group in targets for place in group}
    alike = [g for g in near_groups([(r.near, r.where) for r in usable if r.near is not None]) if not set(g) <= exact]
    if alike:
        what = "a target that looks like another row's"
        findings.append(_copies("note", alike, what, "look at them (echo4o data preview); keep the better one"))
    return findings


def _copies(level: str, groups: Sequence[Sequence[str]], what: str, fix: str) -> DataFinding:
    count = sum(len(group) - 1 for group in groups)
    shown = tuple(" = ".join(group[:3]) for group in groups[:_SHOWN])
    return DataFinding(level, f"{_rows(count)}: {what}", fix, count, shown)


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _places(rows: Sequence[RowFacts]) -> tuple[str, ...]:
    return tuple(row.where for row in rows[:_SHOWN])
