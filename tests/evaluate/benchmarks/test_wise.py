"""WISE: categories by number, the score, and no published total with a failure."""

import json

import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.benchmarks.wise import Wise
from tests.evaluate.benchmarks.judging import judged, text_of

BENCHMARK = Wise()
NUMBERS = {1: "Cultural", 400: "Cultural", 401: "Time", 568: "Space", 701: "Biology", 900: "Physics", 901: "Chemistry"}


def row(number):
    return {
        "Prompt": f"What the baker of village {number} sells at dawn",
        "Explanation": "Fresh bread.",
        "Category": "Cultural knowledge",
        "Subcategory": "Life",
        "prompt_id": number,
    }


@pytest.fixture
def items(tmp_path):
    (tmp_path / "final_data.json").write_text(json.dumps([row(number) for number in NUMBERS]))
    return BENCHMARK.load(tmp_path)


def answer(consistency, realism, aesthetic):
    return {"consistency": consistency, "realism": realism, "aesthetic_quality": aesthetic, "reason": ""}


def test_categories_go_by_number(items):
    assert {int(item.id): item.tag for item in items} == NUMBERS
    (question,) = BENCHMARK.questions(items[0])
    assert items[0].prompt in text_of(question) and "Fresh bread." in text_of(question)


def test_the_three_files_of_its_repository(tmp_path):
    names = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
    for name, number in zip(names, (3, 500, 950), strict=True):
        (tmp_path / name).write_text(json.dumps([row(number)]))
    assert [item.tag for item in BENCHMARK.load(tmp_path)] == ["Cultural", "Time", "Chemistry"]
    (tmp_path / names[1]).unlink()
    with pytest.raises(BenchmarkDataError, match="spatio-temporal"):
        BENCHMARK.load(tmp_path)


def test_score_and_mean_of_categories(items):
    scores = [BENCHMARK.score(item, judged("scores", answer(2, 1, 0))) for item in items]
    assert scores[0].published == pytest.approx((0.7 * 2 + 0.2) / 2)
    assert BENCHMARK.aggregate(scores).published == pytest.approx(0.8)
    scores[0] = BENCHMARK.score(items[0], judged("scores", None, "parse_error"))
    totals = BENCHMARK.aggregate(scores)
    assert totals.published is None
    assert totals.strict == pytest.approx((0.4 + 5 * 0.8) / 6)


def test_numbers_beyond_the_data_are_refused(tmp_path):
    (tmp_path / "final_data.json").write_text(json.dumps([row(1001)]))
    with pytest.raises(BenchmarkDataError, match="1001"):
        BENCHMARK.load(tmp_path)
