"""How numbers are written: the same decimals everywhere in a report."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from echo4o.evaluate.scores import Interval

#: Scale → (lowest, highest, decimals).
_SCALES = {"0-1": (0.0, 1.0, 3), "0-10": (0.0, 10.0, 2), "1-5": (1.0, 5.0, 2), "percent": (0.0, 100.0, 1)}
NONE = "–"
_STATUS_WORDS = {
    "ok": "judged",
    "missing_image": "image missing",
    "api_error": "judge not reached",
    "parse_error": "reply unreadable",
    "not_judged": "not judged yet",
}


@dataclass(frozen=True)
class Scale:
    """Of scores: its ends and how many decimals are worth showing."""

    name: str
    low: float
    high: float
    decimals: int

    def text(self, value: float | None) -> str:
        """`value` with this scale's decimals; a dash for None."""
        return NONE if value is None or not isfinite(value) else f"{value:.{self.decimals}f}"

    def difference(self, value: float | None) -> str:
        """The same with a sign, and a true minus."""
        if value is None or not isfinite(value):
            return NONE
        text = f"{value:+.{self.decimals}f}".replace("-", "−")
        return text if any(digit in text for digit in "123456789") else text[1:]

    def interval(self, interval: Interval | None) -> str:
        """``0.312–0.455``; a dash for None."""
        return NONE if interval is None else f"{self.text(interval.low)}–{self.text(interval.high)}"

    def difference_interval(self, interval: Interval | None) -> str:
        """``−0.012 to +0.045``; a dash for None."""
        if interval is None:
            return NONE
        return f"{self.difference(interval.low)} to {self.difference(interval.high)}"

    @property
    def words(self) -> str:
        """``0 to 10``, ``percent``."""
        return self.name if self.name == "percent" else self.name.replace("-", " to ")

    def share(self, value: float) -> float:
        """Where `value` lies between the ends: 0 … 1."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    @property
    def ticks(self) -> list[float]:
        """Numbers to write on an axis."""
        count = 4 if self.name in ("1-5", "percent", "0-1") else 5
        return [self.low + (self.high - self.low) * step / count for step in range(count + 1)]

    def tick(self, value: float) -> str:
        """A number on an axis, as short as it goes."""
        return f"{value:g}".removeprefix("0") if 0 < value < 1 else f"{value:g}"


def scale_of(name: str) -> Scale:
    """The scale of a benchmark: ``0-1``, ``0-10``, ``1-5`` or ``percent``.

    Raises:
        ValueError: for another name.
    """
    if name not in _SCALES:
        raise ValueError(f"scale is {name!r}; known: {', '.join(_SCALES)}")
    return Scale(name, *_SCALES[name])


def status_words(status: str) -> str:
    """An item's status as a reader says it."""
    return _STATUS_WORDS.get(status, status.replace("_", " "))


def p_text(p: float | None) -> str:
    """A p value: three decimals, or that it is smaller."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(number: int, noun: str) -> str:
    """``1 item``, ``1,200 items``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
