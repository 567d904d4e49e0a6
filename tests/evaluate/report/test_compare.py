"""Runs beside each other: what is claimed of a difference, and what is not."""

from __future__ import annotations

import json
import re

import pytest

from echo4o.evaluate.report import write_report
from tests.evaluate.report.runs import geneval_items, imagine_items, write_run


def right_if(condition):
    return lambda item, question: {"correct": int(condition(int(item.id))), "reason": "because"}


def compared(first, second, out):
    content = json.loads(write_report([first, second], out)[2].read_text())
    return content["comparisons"][0]


def test_a_clear_difference_is_claimed_and_changed_items_come_first(tmp_path):
    items = geneval_items(90)
    a = write_run(tmp_path / "a", "geneval++", items, answer=right_if(lambda n: n % 2 == 0))
    b = write_run(tmp_path / "b", "geneval++", items, answer=right_if(lambda n: n % 2 == 0 or n % 5 != 0), seed=1)
    found = compared(a, b, tmp_path / "out")
    assert found["total"]["claim"] == "b is better"
    assert found["total"]["better"] == 36 and found["total"]["worse"] == 0
    assert found["total"]["difference"] == pytest.approx(36 / 90)
    assert "seed" in found["cautions"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    changes = [float(text) for text in re.findall(r'data-change="([^"]+)"', page)]
    assert changes == [1.0] * 36 + [0.0] * 54
    assert "Comparison of a, b" in page
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "report.html", "report.json", "report.md", "scores_for_card.json", "scores_for_card_2.json",
    ]  # fmt: skip


def test_equal_runs_differ_in_nothing(tmp_path):
    items = geneval_items(30)
    folders = [write_run(tmp_path / name, "geneval++", items, answer=right_if(lambda n: n % 3 == 0)) for name in "ab"]
    found = compared(*folders, tmp_path / "out")
    assert found["total"]["claim"] == "no difference shown"
    assert found["total"]["p_adjusted"] == 1.0


def test_few_pairs_allow_no_claim(tmp_path):
    items = geneval_items(18)
    a = write_run(tmp_path / "a", "geneval++", items, answer=right_if(lambda n: False))
    b = write_run(tmp_path / "b", "geneval++", items, answer=right_if(lambda n: True))
    found = compared(a, b, tmp_path / "out")
    for row in (found["total"], *found["tags"]):
        assert row["p_adjusted"] is None and row["claim"] == "nothing: fewer than 20 pairs"


def test_failures_of_the_judge_are_no_pairs(tmp_path):
    items = geneval_items(30)
    a = write_run(tmp_path / "a", "geneval++", items, answer=right_if(lambda n: True))
    b = write_run(
        tmp_path / "b", "geneval++", items, answer=right_if(lambda n: True), judge="judge-2",
        status=lambda item: {"1": "api_error", "2": "not_judged", "3": "missing_image"}.get(item.id, "ok"),
    )  # fmt: skip
    found = compared(a, b, tmp_path / "out")
    assert (found["total"]["n"], found["total"]["left_out"], found["total"]["worse"]) == (28, 2, 1)
    cautions = " ".join(found["cautions"])
    assert "judges differ" in cautions and "not finished" in cautions


def test_less_than_a_judge_varies_is_said(tmp_path):
    items = imagine_items(80)
    answer = {"fantasy_fulfillment": 8, "identity_preservation": 8, "reason": ""}
    a = write_run(tmp_path / "a", "imagine-bench", items, answer=lambda i, q: answer | {"aesthetic_quality": 7})
    b = write_run(tmp_path / "b", "imagine-bench", items, answer=lambda i, q: answer | {"aesthetic_quality": 8})
    claim = compared(a, b, tmp_path / "out")["total"]["claim"]
    assert claim == "b is better, but by less than judges vary"


def test_runs_of_one_name_are_told_apart(tmp_path):
    items = geneval_items(3)
    a = write_run(tmp_path / "x" / "run", "geneval++", items)
    b = write_run(tmp_path / "y" / "run", "geneval++", items[:2])
    content = json.loads(write_report([a, b], tmp_path / "out")[2].read_text())
    assert [run["name"] for run in content["runs"]] == ["x/run", "y/run"]
    assert "do not have the same items" in " ".join(content["comparisons"][0]["cautions"])
    assert "not part of this run" in (tmp_path / "out" / "report.html").read_text()
