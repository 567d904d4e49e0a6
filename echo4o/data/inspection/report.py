"""A data report for people and for scripts."""

from __future__ import annotations

import dataclasses
import json
import os

from echo4o.data.images import printable
from echo4o.data.inspection.validate import DataReport, FileReport

_MARKS = {"error": "error  ", "warning": "warning", "note": "note   "}
_MAX_FILES = 40


def report_json(report: DataReport) -> str:
    return json.dumps({**dataclasses.asdict(report), "has_errors": report.has_errors}, indent=2)


def report_text(report: DataReport) -> str:
    """Files, then findings with their fixes."""
    looked = "every row" if report.complete else "a sample of the rows"
    how = "pictures decoded" if report.decoded else "headers of pictures only"
    lines = [f"{report.title}: {report.rows:,} rows looked at ({looked}, {how}), {report.usable:,} usable", ""]
    for file in report.files[:_MAX_FILES]:
        lines += _file_lines(file, report.max_num_tokens_per_sample)
    if len(report.files) > _MAX_FILES:
        lines.append(f"  … and {len(report.files) - _MAX_FILES} more files (--json has all)")
    lines.append("")
    for finding in report.findings:
        lines.append(f"  {_MARKS[finding.level]}  {printable(finding.what)}")
        lines.append(f"           → {finding.fix}")
        lines += [f"             {_short(place)}" for place in finding.where]
    if not report.findings:
        lines.append("  nothing is wrong")
    return "\n".join(lines)


def _file_lines(file: FileReport, limit: int) -> list[str]:
    references = ", ".join(f"{rows:,} with {count}" for count, rows in file.references.items()) or "none"
    lines = [f"  {_short(file.file)}: {file.rows:,} rows, {file.usable:,} usable"]
    lines.append(f"    references  {references}")
    if file.sizes:
        (w0, h0), (w1, h1), (w2, h2) = file.sizes
        lines.append(
            f"    images      {w0} × {h0} to {w2} × {h2} px, median {w1} × {h1}; "
            f"sides of at most 1 to {file.longest_side_ratio:.2f}"
        )
    if file.tokens:
        least, middle, high, most = file.tokens
        lines.append(
            f"    tokens      {least:,} to {most:,} a row, median {middle:,}, 95 % below {high:,}; "
            f"{file.too_long:,} beyond max_num_tokens_per_sample {limit:,}"
        )
    return lines


def _short(places: str) -> str:
    """Paths as seen from here."""
    here = os.getcwd() + os.sep
    return printable(places).replace(here, "")
