"""The two ways data can be wrong: a bad row (counted and skipped) and data that cannot be used (the run stops)."""

from __future__ import annotations


class RowError(ValueError):
    """A row that cannot be used. The loader counts it by `reason`, logs it with file and row, and goes on.

    Args:
        reason: short and stable, for counting ("image truncated", "grid too large", …).
        file: file that holds the row.
        row: row or line number in that file, from 0.
        detail: what was found, for the log.
    """

    def __init__(self, reason: str, file: str = "", row: int | None = None, detail: str = "") -> None:
        super().__init__(reason, file, row, detail)
        self.reason = reason
        self.file = file
        self.row = row
        self.detail = detail

    @property
    def where(self) -> str:
        return self.file if self.row is None else f"{self.file}:{self.row}"

    def __str__(self) -> str:
        message = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return f"{self.where}: {message}" if self.where else message

    def at(self, file: str, row: int) -> RowError:
        """The same error with its place filled in, unless it already has one."""
        return self if self.file else type(self)(self.reason, file, row, self.detail)


class GridError(RowError):
    """An image has more patches a side than the position table has entries."""


class DataError(RuntimeError):
    """Data that no row can be drawn from, or a wrong data setting: the run must stop."""
