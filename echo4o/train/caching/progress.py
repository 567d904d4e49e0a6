"""What a run of the cache says while it works: one line now and then, from the first process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from echo4o.train.caching.work import Unit, is_done

INTERVAL = 10.0


class Progress:
    """Rate and remaining time of the units that were not done at the start, whoever does them.

    Args:
        say: prints a line; None where another process speaks.
    """

    def __init__(
        self, folder: Path, units: Sequence[Unit], say: Callable[[str], None] | None, interval: float = INTERVAL
    ) -> None:
        self.folder = folder
        self.say = say
        self.interval = interval
        self.started = time.monotonic()
        self._pending = [unit for unit in units if not is_done(folder, unit)]
        self._total = sum(len(unit.keys) for unit in self._pending)
        self._next = self.started + interval

    def tick(self, in_hand: int = 0) -> None:
        """Say how far it is, if it is time to.

        Args:
            in_hand: images of this process' unit that are ready.
        """
        now = time.monotonic()
        if self.say is None or now < self._next:
            return
        self._next = now + self.interval
        self._pending = [unit for unit in self._pending if not is_done(self.folder, unit)]
        done = self._total - sum(len(unit.keys) for unit in self._pending) + in_hand
        rate = done / (now - self.started)
        left = duration((self._total - done) / rate) if done else "unknown"
        self.say(f"{done:,} of {self._total:,} images, {rate:.1f} images/s, {left} left")


class Looking:
    """Says how far the look at the rows is, every ten seconds."""

    def __init__(self, speak: Callable[[str], None] | None, interval: float = INTERVAL) -> None:
        self.speak = speak
        self.interval = interval
        self._next = time.monotonic() + interval

    def __call__(self, done: int, total: int) -> None:
        if self.speak is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.interval
            self.speak(f"looking for images: {done:,} of {total:,} rows of this process")


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
