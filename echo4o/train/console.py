"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = (
    ("loss", "loss {:.4f}"),
    ("mse", "mse {:.4f}"),
    ("ce", "ce {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.3f}"),
    ("tokens_per_sec", "{:,.0f} tok/s"),
    ("mfu", "mfu {:.1%}"),
    ("data_wait_share", "data {:.0%}"),
)


def summary_line(values: Mapping[str, Any]) -> str:
    parts = [template.format(values[name]) for name, template in SHOWN if values.get(name) is not None]
    if values.get("skipped_steps"):
        parts.append(f"skipped {values['skipped_steps']}")
    return "  ".join(parts)


class ConsoleProgress:
    """Use as a context manager around the loop.

    Args:
        enabled: False on all ranks but the first.
    """

    def __init__(self, total_steps: int, start_step: int, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._total, self._start, self._enabled = total_steps, start_step, enabled
        self._begun = time.perf_counter()
        self._bar = self._task = None
        if enabled and self.console.is_terminal:
            columns = (
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, line="")

    def __enter__(self) -> ConsoleProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        line = summary_line(values)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, line=line)
            return
        done = max(1, step - self._start)
        remaining = (time.perf_counter() - self._begun) / done * (self._total - step)
        self.console.print(f"step {step}/{self._total}  {line}  eta {_clock(remaining)}", markup=False)

    def say(self, text: str) -> None:
        if self._enabled:
            self.console.print(text, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
