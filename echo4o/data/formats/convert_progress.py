"""How far a conversion has come, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Between lines where there is no terminal.
SECONDS_BETWEEN_LINES = 15.0


class ConvertProgress:
    """Counts rows and bytes of images. Use as a context manager around the work.

    Args:
        console: where to write; standard error by default.
        enabled: False for silence.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._total = self._before = self._done = self._bytes = 0
        self._begun = self._last_line = time.monotonic()
        self._bars: Progress | None = None

    def begin(self, total: int, todo: int) -> None:
        """Of `total` rows, `todo` are left."""
        self._total, self._before = total, total - todo
        self._begun = self._last_line = time.monotonic()
        if self._enabled and self.console.is_terminal:
            columns = (
                TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self.console)
            self._task = self._bars.add_task("rows", total=total, completed=self._before, rate="")

    def __enter__(self) -> ConvertProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def advance(self, rows: int, num_bytes: int) -> None:
        """So many more rows are done, with images of so many bytes."""
        self._done += rows
        self._bytes += num_bytes
        if not self._enabled or not rows:
            return
        now = time.monotonic()
        seconds = max(now - self._begun, 1e-6)
        if self._bars is not None:
            if not self._bars.live.is_started:  # its thread must not be running when workers are forked
                self._bars.start()
            self._bars.update(self._task, advance=rows, rate=self._rate(seconds))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            done = self._before + self._done
            left = seconds / self._done * (self._total - done)
            self.console.print(f"{done}/{self._total} rows, {self._rate(seconds)}, {_clock(left)} left", markup=False)

    def say(self, text: str) -> None:
        """A message on a line of its own."""
        if self._enabled:
            self.console.print(text, markup=False)

    def _rate(self, seconds: float) -> str:
        return f"{self._done / seconds:,.0f} rows/s {self._bytes / seconds / 1e6:,.0f} MB/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
