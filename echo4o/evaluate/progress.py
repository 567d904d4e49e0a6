"""How far judging has come: a bar on a terminal, a line now and then elsewhere; rate, time left, failures and cost."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo4o.evaluate.benchmark import Judgement
from echo4o.evaluate.cost import Prices, used

#: Between lines where there is no terminal.
SECONDS_BETWEEN_LINES = 15.0


class JudgeProgress:
    """Use as a context manager.

    Args:
        total: questions to ask.
    """

    def __init__(self, total: int, prices: Prices | None = None, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._total, self._done, self._failed, self._prices = total, 0, 0, prices or Prices()
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._begun = self._last_line = time.monotonic()
        self._bars: Progress | None = None
        if total and self.console.is_terminal:
            columns = (
                TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self.console)
            self._bar = self._bars.add_task("judging", total=total, facts="")

    def __enter__(self) -> JudgeProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def advance(self, judgement: Judgement) -> None:
        """After one question; calls come one at a time."""
        self._done += 1
        self._failed += judgement.status != "ok"
        for name, count in used([judgement]).items():
            self._usage[name] += count
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done, facts=self.facts)
            return
        now, is_last = time.monotonic(), self._done == self._total
        if is_last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            self.console.print(f"judged {self._done}/{self._total}, {self.facts}, {clock(left)} left", markup=False)

    @property
    def facts(self) -> str:
        """Rate, failures, tokens or cost so far."""
        seconds = max(1e-6, time.monotonic() - self._begun)
        parts = [f"{self._done / seconds:.1f}/s"]
        parts += [f"{self._failed} failed"] if self._failed else []
        cost = self._prices.cost(self._usage)
        parts.append(f"{sum(self._usage.values()):,} tokens" if cost is None else f"cost {cost:.2f}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
