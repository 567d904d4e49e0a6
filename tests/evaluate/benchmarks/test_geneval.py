"""GenEval: the layout its scorer reads, and the summary of its results."""

import json

import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.benchmarks.geneval import GenEval
from tests.evaluate.benchmarks.judging import write_lines

BENCHMARK = GenEval()
ROWS = [
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
    {"tag": "single_object", "include": [{"class": "bowl", "count": 1}], "prompt": "a photo of a bowl"},
    {"tag": "counting", "include": [{"class": "oven", "count": 2}], "prompt": "a photo of two ovens"},
]


@pytest.fixture
def items(tmp_path):
    return BENCHMARK.load(write_lines(tmp_path / "evaluation_metadata.jsonl", ROWS))


def results(tmp_path, correct, **changes):
    """What evaluate_images.py writes: a line for each picture; `correct`: row → verdicts of its pictures."""
    rows = [
        {
            "filename": f"images/{index:05d}/samples/{number:05d}.png",
            "tag": ROWS[index]["tag"],
            "prompt": ROWS[index]["prompt"],
            "correct": verdict,
            "reason": "",
            "metadata": json.dumps(ROWS[index]),
            "details": "{}",
        }
        | changes
        for index, verdicts in correct.items()
        for number, verdict in enumerate(verdicts)
    ]
    return write_lines(tmp_path / "results.jsonl", rows)


def test_the_layout(items):
    assert [item.id for item in items] == ["00000", "00001", "00002"]
    assert items[2].num_images == 4
    assert BENCHMARK.image_name(items[2], 3) == "00002/samples/00003.png"
    ((name, text),) = BENCHMARK.sidecars(items[2]).items()
    assert name == "00002/metadata.jsonl" and json.loads(text) == ROWS[2]
    assert BENCHMARK.questions(items[0]) == []


def test_results_are_summarised(items, tmp_path):
    right, wrong = True, False
    path = results(tmp_path, {0: [right] * 4, 1: [right, wrong, wrong, wrong], 2: [wrong, wrong, wrong, right]})
    scores = BENCHMARK.read_results(path, items)
    assert [score.published for score in scores] == [1.0, 0.25, 0.25]
    totals = BENCHMARK.aggregate(scores)
    assert totals.per_tag["single_object"].published == 0.625
    assert totals.published == totals.strict == (0.625 + 0.25) / 2
    assert totals.others == {"of_images": 0.5, "of_prompts_any": 1.0}


def test_absent_pictures_are_wrong_in_the_strict_score_alone(items, tmp_path):
    scores = BENCHMARK.read_results(results(tmp_path, {0: [True, True], 2: [True] * 4}), items)
    assert [(score.published, score.strict, score.status) for score in scores] == [
        (1.0, 0.5, "missing_image"),
        (None, 0.0, "missing_image"),
        (1.0, 1.0, "ok"),
    ]
    totals = BENCHMARK.aggregate(scores)
    assert (totals.published, totals.strict) == (1.0, 0.625)
    assert BENCHMARK.aggregate([BENCHMARK.score(item, {}) for item in items]).published is None


def test_results_of_other_prompts_are_refused(items, tmp_path):
    with pytest.raises(BenchmarkDataError, match="is 'colors' here and 'single_object'"):
        BENCHMARK.read_results(results(tmp_path, {0: [True]}, tag="colors"), items)
    with pytest.raises(BenchmarkDataError, match="have no 00009"):
        BENCHMARK.read_results(results(tmp_path, {0: [True]}, filename="00009/samples/00000.png"), items)
    with pytest.raises(BenchmarkDataError, match="twice"):
        BENCHMARK.read_results(results(tmp_path, {0: [True, True]}, filename="00000/samples/00000.png"), items)
    with pytest.raises(BenchmarkDataError, match="is not …"):
        BENCHMARK.read_results(results(tmp_path, {0: [True]}, filename="kite.png"), items)
