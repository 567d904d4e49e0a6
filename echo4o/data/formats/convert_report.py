"""What became of a conversion, for programs and for people."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echo4o.data.formats.parts import PartResult
from echo4o.data.formats.workspace import SKIPPED, SUMMARY
from echo4o.data.formats.writers import KindSummary


@dataclass(frozen=True)
class ConvertReport:
    """What became of a conversion.

    Attributes:
        destination: the data set.
        result: counts over all parts.
        problems: what was found wrong with the source on opening.
        num_files: files of the data set.
        num_bytes: of all its files.
        seconds: that this run took.
        was_finished: nothing was left to do.
    """

    destination: Path
    result: PartResult
    problems: Sequence[str]
    num_files: int
    num_bytes: int
    seconds: float
    was_finished: bool = False


def report_lines(report: ConvertReport) -> list[str]:
    """What became of a conversion, for people."""
    result, lines = report.result, []
    written = ", ".join(f"{summary.rows} {kind}" for kind, summary in result.kinds.items())
    if report.was_finished:
        lines.append(f"{report.destination} is finished already; nothing was done")
    speed = f", {result.num_written / max(report.seconds, 1e-9):,.0f} rows/s" if not report.was_finished else ""
    lines.append(
        f"{report.destination}: {result.num_written} rows ({written}) in {report.num_files} files, "
        f"{report.num_bytes / 1e6:,.1f} MB, {report.seconds:.1f} s{speed}"
    )
    if result.bad:
        lines.append(f"bad rows left out: {counted(result.bad)}")
    if result.held_not:
        lines.append(f"rows left out, as the target has no place for them: {counted(result.held_not)}")
    if result.bad or result.held_not:
        lines.append(f"  listed in {report.destination / SKIPPED}")
    lines += [f"{note}: {count} rows" for note, count in sorted(result.notes.items())]
    lines.append(f"train on it: echo4o train --dataset_config_file {report.destination / 'dataset.yaml'}")
    return lines


def report_of(
    final: Path, result: PartResult, problems: Sequence[str], started: float, was_finished: bool = False
) -> ConvertReport:
    """A report on the data set as it stands. `started`: monotonic time."""
    files = [path for path in final.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    seconds = time.monotonic() - started
    return ConvertReport(final, result, problems, len(files), num_bytes, seconds, was_finished)


def summed_up(final: Path) -> PartResult:
    """Counts of a data set that was finished earlier, as far as its summary tells them."""
    summary = json.loads((final / SUMMARY).read_text(encoding="utf-8"))
    return PartResult(
        rows=summary["rows"],
        image_bytes=summary["image_bytes"],
        kinds={kind: KindSummary(rows=rows) for kind, rows in summary["written"].items()},
        bad=Counter(summary["bad"]),
        held_not=Counter(summary["not_held"]),
        notes=Counter(summary["notes"]),
    )


def counted(counts: Mapping[str, int]) -> str:
    """Reasons and their counts, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"
