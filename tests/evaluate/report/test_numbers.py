"""Numbers are written the same way everywhere."""

import pytest

from echo4o.evaluate.report.charts import Series, bar, radar
from echo4o.evaluate.report.compare import holm
from echo4o.evaluate.report.facts import without_place
from echo4o.evaluate.report.numbers import counted, p_text, scale_of
from echo4o.evaluate.scores import Interval


@pytest.mark.parametrize(
    ("scale", "value", "text", "difference"),
    [
        ("0-1", 0.7321, "0.732", "+0.732"),
        ("0-10", 8.613, "8.61", "+8.61"),
        ("percent", -3.04, "-3.0", "−3.0"),
        ("0-10", -0.001, "-0.00", "0.00"),
        ("1-5", None, "–", "–"),
        ("1-5", float("nan"), "–", "–"),
    ],
)
def test_decimals_follow_the_scale(scale, value, text, difference):
    assert scale_of(scale).text(value) == text
    assert scale_of(scale).difference(value) == difference


def test_intervals_and_words():
    assert scale_of("0-10").interval(Interval(6.1, 7.345)) == "6.10–7.34"
    assert scale_of("0-10").interval(None) == "–"
    assert scale_of("0-1").difference_interval(Interval(-0.02, 0.1)) == "−0.020 to +0.100"
    assert [counted(n, "item") for n in (1, 2, 1200)] == ["1 item", "2 items", "1,200 items"]
    assert [p_text(p) for p in (None, 0.0002, 0.05)] == ["–", "< 0.001", "0.050"]
    with pytest.raises(ValueError, match="known: 0-1"):
        scale_of("0-100")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/alice/models/mine", "models/mine"),
        ("/home/alice/mine", "mine"),
        ("/mine", "mine"),
        ("owner/name", "owner/name"),
        ("gpt-4.1", "gpt-4.1"),
    ],
)
def test_paths_do_not_tell_whose_machine_it_was(path, shown):
    assert without_place(path) == shown


def test_holm_by_hand():
    # Sorted: 0.01 · 4, 0.02 · 3, 0.03 · 2, 0.04 · 1, never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bars_end_where_their_numbers_are():
    svg = bar(3.0, Interval(2.0, 4.0), scale_of("1-5"), colour="run-0", mark=1.0)
    assert 'width="50.00%"' in svg  # 3 lies in the middle of 1 … 5
    assert 'x1="25.00%" x2="75.00%"' in svg and 'x="0.00%"' in svg
    assert "<rect" not in bar(None, None, scale_of("0-1"), colour="run-0")
    assert 'width="0.00%"' in bar(-1.0, None, scale_of("0-10"), colour="run-0")  # below the scale


def test_a_radar_chart_needs_an_area():
    with pytest.raises(ValueError, match="three axes"):
        radar([("A", "1"), ("B", "1")], [])
    svg = radar([("A & B", "1"), ("B", "1"), ("C", "1")], [Series("<me>", [1.0, 0.5, 0.0], "run-0")])
    assert "A &amp; B" in svg and "<me>" not in svg and "0.0,-130.0" in svg
