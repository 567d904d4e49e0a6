"""Charts as SVG, written by hand: bars that stretch with the page, and a radar chart.

Colours are classes of the page's style: ``run-0``, ``run-1``, … and ``published``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import cos, pi, sin

from echo4o.evaluate.report.numbers import Scale
from echo4o.evaluate.scores import Interval

_RADIUS, _RINGS = 130, 5
#: Width of a letter of the radar's labels, about; room around the chart.
_LETTER, _MARGIN = 7.6, 8


@dataclass(frozen=True)
class Series:
    """A polygon of the radar chart.

    Attributes:
        shares: one an axis, 0 (centre) … 1 (rim).
        colour: class of the page's style.
    """

    name: str
    shares: Sequence[float]
    colour: str


def bar(
    value: float | None,
    interval: Interval | None,
    scale: Scale,
    *,
    colour: str,
    mark: float | None = None,
) -> str:
    """A bar from the scale's lowest value to `value`, with its interval as a whisker and a diamond at `mark`.

    It has no words: it stands beside the number it draws. As wide as there is room, 18 px high.
    """
    parts = [f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>' for x in _percents(scale)]
    if value is not None:
        parts.append(f'<rect class="bar" y="3" height="12" width="{100 * scale.share(value):.2f}%" rx="1.5"/>')
    if interval is not None:
        low, high = (100 * scale.share(end) for end in (interval.low, interval.high))
        parts.append(f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="9" y2="9"/>')
        parts += [f'<line class="whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="5" y2="13"/>' for x in (low, high)]
    if mark is not None:
        x = f"{100 * scale.share(mark):.2f}%"
        parts.append(f'<svg x="{x}" y="9" overflow="visible"><path class="mark" d="M0-5L5 0L0 5L-5 0Z"/></svg>')
    return f'<svg class="bars {colour}" width="100%" height="18" aria-hidden="true">{"".join(parts)}</svg>'


def axis(scale: Scale) -> str:
    """The numbers above a column of bars."""
    labels = []
    for value, x in zip(scale.ticks, _percents(scale), strict=True):
        anchor = "start" if x == 0 else "end" if x == 100 else "middle"
        labels.append(f'<text x="{x:.2f}%" y="12" text-anchor="{anchor}">{scale.tick(value)}</text>')
    return f'<svg class="axis" width="100%" height="16" aria-hidden="true">{"".join(labels)}</svg>'


def radar(axes: Sequence[tuple[str, str]], series: Sequence[Series]) -> str:
    """Benchmarks as spokes, models as polygons.

    Args:
        axes: (name, what the rim stands for), three or more, clockwise from the top.

    Raises:
        ValueError: with fewer than three axes: that is no area.
    """
    if len(axes) < 3:
        raise ValueError(f"a radar chart needs three axes, not {len(axes)}")
    words = "; ".join(
        f"{one.name}: "
        + ", ".join(f"{axis[0]} {100 * share:.0f} %" for axis, share in zip(axes, one.shares, strict=True))
        for one in series
    )
    parts = [f"<title>{escape(f'Share of the full score. {words}')}</title>"]
    for ring in range(1, _RINGS + 1):
        parts.append(_polygon([ring / _RINGS] * len(axes), "ring"))
    left, top, right, bottom = 0.0, 0.0, 0.0, 0.0
    for number, (name, rim) in enumerate(axes):
        x, y = _point(number, len(axes), 1.0)
        parts.append(f'<line class="ring" x1="0" y1="0" x2="{x:.1f}" y2="{y:.1f}"/>')
        # Labels stand beside the chart at its sides, and above or below their points elsewhere.
        beside = abs(x) > 0.9 * _RADIUS
        x, y = x * 1.08, y * 1.08 + (0 if beside else -22 if y < 0 else 16)
        anchor = "middle" if not beside else "start" if x > 0 else "end"
        width = _LETTER * max(len(name), len(rim))
        start = x - width / 2 if not beside else x if x > 0 else x - width
        left, right = min(left, start), max(right, start + width)
        top, bottom = min(top, y - 14), max(bottom, y + 18)
        parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}'
            f'<tspan class="rim" x="{x:.1f}" dy="15">{escape(rim)}</tspan></text>'
        )
    for one in series:
        parts.append(_polygon(one.shares, f"area {one.colour}"))
        for number, share in enumerate(one.shares):
            x, y = _point(number, len(axes), share)
            parts.append(f'<circle class="dot {one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    width, height = right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN
    box = f"{left - _MARGIN:.0f} {top - _MARGIN:.0f} {width:.0f} {height:.0f}"
    return f'<svg class="radar" viewBox="{box}" role="img">{"".join(parts)}</svg>'


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What the colours mean: (name, class) → a list."""
    items = "".join(f'<li class="{colour}"><i class="swatch"></i>{escape(name)}</li>' for name, colour in entries)
    return f'<ul class="key">{items}</ul>'


def _percents(scale: Scale) -> list[float]:
    return [100 * scale.share(tick) for tick in scale.ticks]


def _point(number: int, count: int, share: float) -> tuple[float, float]:
    angle = 2 * pi * number / count
    return _RADIUS * share * sin(angle), -_RADIUS * share * cos(angle)


def _polygon(shares: Sequence[float], classes: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_point(i, len(shares), s) for i, s in enumerate(shares)))
    return f'<polygon class="{classes}" points="{points}"/>'
