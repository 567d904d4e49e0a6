"""What a check of a folder finds, in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEVELS = ("error", "warning", "note")
_MARKS = {"error": "error  ", "warning": "warning", "note": "note   "}
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        level: ``error`` (does not load, or computes something else), ``warning`` (works here, may not elsewhere) or
            ``note``.
        where: name of the file, ``.`` for the folder itself.
        what: in words.
        fix: what to do; empty for notes that ask for nothing.
    """

    level: str
    where: str
    what: str
    fix: str = ""


@dataclass
class Examination:
    """Findings so far, and what later checks need not look at again.

    Attributes:
        unusable: names of files that are missing or damaged, which has been said.
        doubts: errors of files that count only if nothing more exact is found about the same file.
    """

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    doubts: list[Finding] = field(default_factory=list)

    def error(self, where: str, what: str, fix: str) -> None:
        self.findings.append(Finding("error", where, what, fix))

    def unusable_file(self, where: str, what: str, fix: str) -> None:
        """An error after which the file is left alone; said once a file."""
        if where not in self.unusable:
            self.unusable.add(where)
            self.error(where, what, fix)

    def warning(self, where: str, what: str, fix: str) -> None:
        self.findings.append(Finding("warning", where, what, fix))

    def note(self, where: str, what: str, fix: str = "") -> None:
        self.findings.append(Finding("note", where, what, fix))

    def doubt(self, where: str, what: str, fix: str) -> None:
        self.doubts.append(Finding("error", where, what, fix))

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def conclude(self) -> list[Finding]:
        """All findings, errors first."""
        blamed = {finding.where for finding in self.findings if finding.level == "error"}
        for doubt in self.doubts:
            if doubt.where not in blamed:
                blamed.add(doubt.where)
                self.findings.append(doubt)
        return sorted(self.findings, key=lambda finding: LEVELS.index(finding.level))


def some(names: Sequence[str], shown: int = _SHOWN_NAMES) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


def counted(number: int, thing: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def exit_status(findings: Sequence[Finding]) -> int:
    """Of a command: 1 if there is an error."""
    return int(any(finding.level == "error" for finding in findings))


def report_text(findings: Sequence[Finding], folder: str | Path) -> str:
    """One line for the folder, then two for each finding: what, and what to do."""
    lines = [f"{folder}: {_summary(findings)}"]
    for finding in findings:
        where = "" if finding.where == "." else f"{finding.where}: "
        lines.append(f"  {_MARKS[finding.level]}  {where}{finding.what}")
        if finding.fix:
            lines.append(f"           → {finding.fix}")
    return "\n".join(lines)


def report_json(findings: Sequence[Finding], folder: str | Path) -> str:
    """``{"folder", "ok", "errors", "warnings", "notes", "findings": [{"level", "where", "what", "fix"}]}``."""
    counts = {f"{level}s": sum(finding.level == level for finding in findings) for level in LEVELS}
    content = {"folder": str(folder), "ok": not exit_status(findings), **counts}
    return json.dumps({**content, "findings": [asdict(finding) for finding in findings]}, indent=2)


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    if not counts["error"] and not counts["warning"]:
        return "nothing is wrong"
    parts = [counted(counts[level], level) for level in ("error", "warning") if counts[level]]
    return ", ".join(parts) if counts["error"] else f"no errors, {parts[0]}"
