"""How sure a score is: bootstrap intervals, and paired tests of two runs.

Items are resampled within their tags, since a benchmark fixes how many items a tag has. Nothing here knows how a judge
would answer a second time: a model judge's own variance comes on top.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from echo4o.evaluate.benchmark import Benchmark, ItemScore

Variant = Literal["published", "strict"]
#: Flips of sign that are enumerated; above, they are drawn.
_ENUMERATED = 14
_CHUNK = 512


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two runs on the items that both have.

    Attributes:
        first, second: their totals on these items.
        difference: second − first.
        interval: of the difference.
        p_value: of the hypothesis that the runs are exchangeable, two-sided.
        test: ``mcnemar`` (exact) if every score is the lowest or the highest, else ``sign-flip`` (permutation).
        n: items compared; `better`, `worse` and `equal` of them in the second run.
        left_out: items that one run lacks or that were not judged in one.
    """

    first: float
    second: float
    difference: float
    interval: Interval
    p_value: float
    test: Literal["mcnemar", "sign-flip"]
    n: int
    better: int
    worse: int
    equal: int
    left_out: int


def bootstrap(
    benchmark: Benchmark,
    scores: Sequence[ItemScore],
    variant: Variant = "strict",
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Interval | None, dict[str, Interval]]:
    """Intervals of the total and of each tag's mean; None without a single score.

    The total is `Benchmark.weights` over the tags' means. The same scores and seed give the same interval, in whatever
    order the items come.
    """
    groups = _by_tag(scores, variant)
    if not groups:
        return None, {}
    weights = _shares(benchmark, {tag: len(values) for tag, values in groups.items()})
    total = np.zeros(num_resamples)
    intervals = {}
    for tag, values in groups.items():
        means = _resampled_means(np.sort(values), num_resamples, _generator(seed, tag))
        intervals[tag] = _percentiles(means, level)
        total += weights[tag] * means
    return _percentiles(total, level), intervals


def compare(
    benchmark: Benchmark,
    first: Sequence[ItemScore],
    second: Sequence[ItemScore],
    variant: Variant = "strict",
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    num_flips: int = 10000,
    seed: int = 0,
) -> Comparison | None:
    """Whether the second run differs from the first; None if no item was judged in both.

    A missing image is a result (the lowest score); a failed or absent judgement is none, and its item is left out.
    """
    left, right = _judged(first, variant), _judged(second, variant)
    names = sorted(left.keys() & right.keys())
    left_out = len(left.keys() | right.keys() | {s.item for s in (*first, *second)}) - len(names)
    if not names:
        return None
    a = np.array([left[name][1] for name in names])
    b = np.array([right[name][1] for name in names])
    tags = [left[name][0] for name in names]
    share = _item_shares(benchmark, tags)
    # Scores are computed the same way in both runs: the tolerance is for sums in another order only.
    difference = np.where(np.abs(b - a) < 1e-12, 0.0, b - a)
    is_binary = set(np.unique(np.concatenate([a, b])).tolist()) <= {0.0, 1.0} and benchmark.scale == "0-1"
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    if is_binary:
        p_value = mcnemar(better, worse)
    else:
        p_value = sign_flip(share * difference, num_flips, _generator(seed, "flips"))
    return Comparison(
        first=float(share @ a),
        second=float(share @ b),
        difference=float(share @ difference),
        interval=_difference_interval(difference, share, tags, level, num_resamples, seed),
        p_value=p_value,
        test="mcnemar" if is_binary else "sign-flip",
        n=len(names),
        better=better,
        worse=worse,
        equal=len(names) - better - worse,
        left_out=left_out,
    )


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value: the binomial test of the discordant pairs at 1/2."""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    tail, ways = 0, 1  # in whole numbers: exact for any n
    for i in range(k + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def sign_flip(contributions: np.ndarray, num_flips: int, generator: np.random.Generator) -> float:
    """Two-sided p-value of Σ contributions when each sign is as likely as the other.

    Exact for few non-zero contributions; otherwise by `num_flips` draws, the observed one among them, so never 0.

    Args:
        contributions: (n,) each item's part of the difference of the totals.
    """
    parts = contributions[contributions != 0]
    if len(parts) == 0:
        return 1.0
    observed = abs(parts.sum()) * (1 - 1e-9)  # equal sums in another order count as equal
    if len(parts) <= _ENUMERATED:
        bits = (np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts))) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ parts) >= observed))
    extreme, drawn = 0, 0
    while drawn < num_flips:
        size = min(_CHUNK, num_flips - drawn)
        signs = generator.integers(0, 2, (size, len(parts)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ parts) >= observed).sum())
        drawn += size
    return (extreme + 1) / (num_flips + 1)


def _value(score: ItemScore, variant: Variant) -> float | None:
    return score.published if variant == "published" else score.strict


def _by_tag(scores: Sequence[ItemScore], variant: Variant) -> dict[str, np.ndarray]:
    groups: dict[str, list[float]] = {}
    for score in scores:
        value = _value(score, variant)
        if value is not None:
            groups.setdefault(score.tag, []).append(value)
    return {tag: np.array(values) for tag, values in sorted(groups.items())}


def _judged(scores: Sequence[ItemScore], variant: Variant) -> dict[str, tuple[str, float]]:
    """item → (tag, score) of those with a result."""
    found = {}
    for score in scores:
        value = _value(score, variant)
        if value is not None and score.status in ("ok", "missing_image"):
            found[score.item] = (score.tag, value)
    return found


def _shares(benchmark: Benchmark, counts: Mapping[str, int]) -> dict[str, float]:
    """Tags' weights with sum 1."""
    weights = benchmark.weights(counts)
    total = math.fsum(weights[tag] for tag in counts)
    return {tag: weights[tag] / total for tag in counts}


def _item_shares(benchmark: Benchmark, tags: Sequence[str]) -> np.ndarray:
    """(n,) each item's weight in the total, with sum 1."""
    counts = {tag: tags.count(tag) for tag in set(tags)}
    weights = _shares(benchmark, counts)
    return np.array([weights[tag] / counts[tag] for tag in tags])


def _difference_interval(
    difference: np.ndarray, share: np.ndarray, tags: Sequence[str], level: float, num_resamples: int, seed: int
) -> Interval:
    total = np.zeros(num_resamples)
    for tag in sorted(set(tags)):
        chosen = np.array([other == tag for other in tags])
        means = _resampled_means(difference[chosen], num_resamples, _generator(seed, f"difference {tag}"))
        total += share[chosen].sum() * means
    return _percentiles(total, level)


def _resampled_means(values: np.ndarray, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(num_resamples,) means of as many values drawn with replacement."""
    means = [
        values[generator.integers(0, len(values), (min(_CHUNK, num_resamples - start), len(values)))].mean(axis=1)
        for start in range(0, num_resamples, _CHUNK)
    ]
    return np.concatenate(means)


def _percentiles(values: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high), level)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
