"""Two runs of one benchmark: differences in total and by tag, and what may be claimed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from echo4o.evaluate import scores
from echo4o.evaluate.report.numbers import Scale
from echo4o.evaluate.report.reading import Result

#: Below this many pairs nothing is claimed; nor where fewer than `MIN_CHANGED` of them differ.
MIN_PAIRS, MIN_CHANGED = 20, 6
LEVEL = 0.05
#: How far scores of 0 … 10 wander when the same pictures are judged again.
JUDGE_VARIANCE = 0.3
TESTS = {"mcnemar": "exact McNemar test", "sign-flip": "sign-flip permutation test"}


@dataclass(frozen=True)
class Difference:
    """The second run minus the first, by strict scores.

    Attributes:
        tag: "" for all items.
        found: of the items with a verdict in both runs; None without any.
        p: its p value; of tags adjusted by Holm for how many there are. None where there are too few pairs.
    """

    tag: str
    found: scores.Comparison | None
    p: float | None

    @property
    def is_shown(self) -> bool:
        """Whether chance alone is an unlikely reason of the difference."""
        found = self.found
        return found is not None and self.p is not None and self.p < LEVEL and _changed(found) >= MIN_CHANGED

    def claim(self, scale: Scale, name: str) -> str:
        """What may be said of the second run, called `name`."""
        if self.found is None or self.p is None:
            return f"nothing: fewer than {MIN_PAIRS} pairs"
        if not self.is_shown:
            return "no difference shown"
        words = f"{name} is better" if self.found.difference > 0 else f"{name} is worse"
        small = scale.name == "0-10" and abs(self.found.difference) < JUDGE_VARIANCE
        return f"{words}, but by less than judges vary" if small else words


@dataclass(frozen=True)
class Compared:
    """Differences in total and by tag, and why to read them with care."""

    total: Difference
    tags: tuple[Difference, ...]
    cautions: tuple[str, ...]


def compare_results(first: Result, second: Result) -> Compared:
    """The second run against the first, which is of the same benchmark."""
    total = _difference("", first, second)
    tags = [_difference(tag, first, second) for tag in first.totals.per_tag if tag in second.totals.per_tag]
    tested = [row for row in tags if row.p is not None]
    adjusted = dict(zip((row.tag for row in tested), holm([row.p or 0.0 for row in tested]), strict=True))
    rows = tuple(Difference(row.tag, row.found, adjusted.get(row.tag)) for row in tags)
    return Compared(total, rows, tuple(_cautions(first, second)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for how many there are (Holm 1979), in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def _difference(tag: str, first: Result, second: Result) -> Difference:
    left, right = ([s for s in result.scores if not tag or s.tag == tag] for result in (first, second))
    found = scores.compare(first.benchmark, left, right)
    return Difference(tag, found, found.p_value if found and found.n >= MIN_PAIRS else None)


def _changed(found: scores.Comparison) -> int:
    return found.better + found.worse


def _cautions(first: Result, second: Result) -> list[str]:
    cautions = []
    if first.judges and second.judges and first.judges != second.judges:
        cautions.append(
            f"The judges differ ({', '.join(first.judges)}; {', '.join(second.judges)}): "
            "the difference is theirs as well as the models'."
        )
    names = ("settings", "seed", "options", "dtype", "quantize", "images_from", "versions")
    changed = [name.replace("_", " ") for name in names if first.facts.get(name) != second.facts.get(name)]
    if changed:
        cautions.append(f"The runs differ in {', '.join(changed)}, not only in the model: see the details of the runs.")
    if {s.item for s in first.scores} != {s.item for s in second.scores}:
        cautions.append("The runs do not have the same items; only those that both have are compared.")
    if first.facts.get("fingerprint") and first.facts.get("fingerprint") == second.facts.get("fingerprint"):
        cautions.append("Both runs drew with the same model: differences come from seeds, settings or the judge.")
    if first.num_open or second.num_open:
        cautions.append("Judging is not finished: the items compared may be no fair sample of all.")
    return cautions
