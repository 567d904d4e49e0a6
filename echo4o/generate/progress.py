"""How far a run has come: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Between lines where there is no terminal.
SECONDS_BETWEEN_LINES = 15.0


class RunProgress:
    """Counts requests, and the denoising steps of those that run. Use as a context manager.

    Args:
        total: requests.
        enabled: False on all ranks but the first.
    """

    def __init__(self, total: int, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._total, self._done, self._enabled = total, 0, enabled
        self._begun = self._last_line = time.monotonic()
        self._bars: Progress | None = None
        if enabled and total and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self.console)
            self._requests = self._bars.add_task("requests", total=total, rate="", visible=total > 1)
            self._steps = self._bars.add_task("steps", total=None, rate="")

    def __enter__(self) -> RunProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def step(self, done: int, total: int) -> None:
        """After a denoising step of the requests that run now."""
        if self._bars is None:
            return
        if done == 1:
            self._bars.reset(self._steps, total=total, completed=0)
        self._bars.update(self._steps, completed=done)

    def advance(self, count: int = 1) -> None:
        """After `count` requests."""
        self._done += count
        seconds = time.monotonic() - self._begun
        rate = f"{self._done / seconds:.2f}/s" if self._done > seconds else f"{seconds / self._done:.1f} s each"
        if self._bars is not None:
            self._bars.update(self._requests, completed=self._done, rate=rate)
            return
        now, is_last = time.monotonic(), self._done == self._total
        if self._enabled and self._total > 1 and (is_last or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            left = _clock(seconds / self._done * (self._total - self._done))
            self.console.print(f"{self._done}/{self._total} requests, {rate}, {left} left", markup=False)

    def say(self, text: str) -> None:
        """A message of any rank."""
        self.console.print(text, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
