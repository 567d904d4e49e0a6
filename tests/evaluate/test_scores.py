"""Intervals and paired tests, against numbers worked out by hand or by another way."""

import math
from pathlib import Path

import numpy as np
import pytest

from echo4o.evaluate.benchmark import Benchmark, ItemScore, weighted_mean
from echo4o.evaluate.scores import bootstrap, compare, mcnemar, sign_flip


class ByWeight(Benchmark):
    """Two tags, of which one counts three times."""

    name, title, scale = "by-weight", "By weight", "0-10"
    settings = {}

    def load(self, path: Path | None):
        return []

    def score(self, item, judgements):
        raise NotImplementedError

    def weights(self, counts):
        return {tag: {"a": 3.0, "b": 1.0}[tag] for tag in counts}


class RightOrWrong(ByWeight):
    scale = "0-1"


def run(values, tag="a", status="ok"):
    return [ItemScore(f"{tag}{i}", tag, value, value, {}, status) for i, value in enumerate(values)]


def test_total_is_the_weighted_mean_of_tags():
    totals = ByWeight().aggregate(run([2.0, 4.0]) + run([8.0], "b"))
    assert totals.strict == totals.published == (3 * 3 + 8) / 4
    assert [one.n for one in totals.per_tag.values()] == [2, 1]
    with pytest.raises(ValueError, match="nothing to average"):
        weighted_mean({}, {})


def test_interval_covers_what_it_says():
    """Of 200 samples of 60 values of a known mean about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        interval, per_tag = bootstrap(ByWeight(), run(rng.normal(5, 2, 60)), num_resamples=400, seed=seed)
        held += interval.low <= 5 <= interval.high
        assert per_tag["a"] == interval
    assert 0.9 <= held / 200 <= 0.98


def test_interval_is_of_the_scores_and_the_seed_alone():
    scores = run([1.0, 2.0, 5.0, 9.0]) + run([3.0, 4.0], "b")
    first = bootstrap(ByWeight(), scores, seed=3)
    assert bootstrap(ByWeight(), scores[::-1], seed=3) == first
    assert bootstrap(ByWeight(), scores, seed=4) != first
    assert bootstrap(ByWeight(), [], seed=3) == (None, {})


def test_interval_of_equal_scores_is_a_point():
    interval, _ = bootstrap(ByWeight(), run([4.0] * 5) + run([8.0] * 5, "b"))
    assert interval.low == interval.high == 5.0


def test_published_intervals_leave_out_what_upstream_does():
    scores = [*run([6.0, 6.0]), ItemScore("x", "a", None, 0.0, {}, "missing_image")]
    assert bootstrap(ByWeight(), scores, "published")[0].low == 6.0
    assert bootstrap(ByWeight(), scores, "strict")[0].low < 6.0


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 9, 22 / 1024), (3000, 2800, 0.008969)]
)
def test_mcnemar(better, worse, p):
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(p, abs=1e-6)


def test_sign_flip_by_enumeration_and_by_drawing_agree():
    rng = np.random.default_rng(1)
    parts = rng.normal(0.4, 0.8, 10)  # no two sums are equal
    exact = sign_flip(parts, 0, rng)
    many = np.concatenate([parts, np.full(10, 1e-9)])  # too many to enumerate, and without effect
    assert sign_flip(many, 20000, rng) == pytest.approx(exact, abs=0.01)
    assert sign_flip(np.ones(6), 0, rng) == 2 / 64
    assert sign_flip(np.zeros(6), 0, rng) == 1.0
    assert sign_flip(np.ones(50), 999, rng) == 1 / 1000


def test_right_or_wrong_runs_are_compared_by_mcnemar():
    first = run([1.0] * 10 + [0.0] * 10)
    second = run([1.0] * 16 + [0.0] * 4)
    found = compare(RightOrWrong(), first, second)
    assert (found.test, found.p_value, found.better, found.worse, found.equal) == ("mcnemar", 2 / 64, 6, 0, 14)
    assert found.difference == pytest.approx(0.3)
    assert 0 < found.interval.low < 0.3 < found.interval.high


def test_graded_runs_are_compared_on_weighted_differences():
    first = run([5.0] * 20) + run([5.0] * 20, "b")
    second = run([6.0] * 20) + run([5.5] * 20, "b")
    found = compare(ByWeight(), first, second)
    assert found.test == "sign-flip" and found.p_value < 0.001
    assert found.difference == pytest.approx((3 * 1 + 0.5) / 4)
    assert math.isclose(found.second - found.first, found.difference)
    same = compare(ByWeight(), first, first)
    assert (same.p_value, same.difference, same.equal) == (1.0, 0.0, 40)


def test_items_without_a_result_in_one_run_are_left_out():
    first = [*run([5.0, 5.0, 5.0]), ItemScore("x", "a", None, 0.0, {}, "parse_error")]
    second = [*run([6.0, 6.0]), ItemScore("x", "a", 9.0, 9.0)]
    found = compare(ByWeight(), first, second)
    assert (found.n, found.left_out, found.difference) == (2, 2, 1.0)
    assert compare(ByWeight(), first, []) is None


def test_under_the_null_p_values_are_small_as_often_as_they_may_be():
    rng = np.random.default_rng(2)
    small = 0
    for seed in range(200):
        a, b = rng.normal(5, 1, (2, 30))
        small += compare(ByWeight(), run(a), run(b), num_flips=400, num_resamples=50, seed=seed).p_value < 0.05
    assert small / 200 < 0.09
