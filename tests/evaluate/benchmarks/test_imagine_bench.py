"""Imagine-Bench: formula, weights, and upstream's two totals."""

from collections import Counter

import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.benchmarks.imagine_bench import ImagineBench
from tests.evaluate.benchmarks.judging import judged, text_of, write_lines

BENCHMARK = ImagineBench()
KINDS = ("COLOR", "SHAPE", "MATERIAL", "SIZE", "COMBINATION", "TIME", "ENVIRONMENT", "Multi-Object", "Multi-Object")


def row(number, kind):
    return {
        "id": number,
        "instruction": f"A photo of teapot {number} knitted from moss",
        "note": "The teapot is of moss; its shape and spout stay.",
        "type": kind,
    }


def answer(fantasy, identity, aesthetic):
    return {
        "fantasy_fulfillment": fantasy,
        "identity_preservation": identity,
        "aesthetic_quality": aesthetic,
        "reason": "",
    }


@pytest.fixture
def items(tmp_path):
    """As many of each type as the official file has."""
    rows = [row(30 * block + i + 1, kind) for block, kind in enumerate(KINDS) for i in range(30)]
    return BENCHMARK.load(write_lines(tmp_path / "Imagine.jsonl", rows))


def test_types_are_merged(items):
    assert Counter(item.tag for item in items) == {
        "Attribute shift": 90,
        "Hybridization": 60,
        "Spatiotemporal": 60,
        "Multi-Object": 60,
    }
    assert (items[95].fields["type"], items[95].tag) == ("SIZE", "Attribute shift")


def test_the_question_has_instruction_and_note(items):
    (question,) = BENCHMARK.questions(items[0])
    text = text_of(question)
    assert items[0].prompt in text and items[0].fields["note"] in text
    assert list(question.answer.schema["properties"])[:3] == list(answer(1, 1, 1))[:3]


def test_the_weaker_of_two_counts_most(items):
    score = BENCHMARK.score(items[0], judged("scores", answer(9, 7.5, 8)))
    assert score.published == score.strict == round(0.8 * 7.5 + 0.2 * 8, 3) == 7.6
    assert score.parts == {"fantasy_fulfillment": 9, "identity_preservation": 7.5, "aesthetic_quality": 8}


def test_failures_count_as_upstream_and_strictly(items):
    published = {"missing_image": None, "api_error": 0.0, "parse_error": -1.0}
    for status, value in published.items():
        score = BENCHMARK.score(items[0], judged("scores", None, status))
        assert (score.published, score.strict, score.status) == (value, 0.0, status)
    scores = [
        BENCHMARK.score(items[0], judged("scores", answer(8, 8, 8))),
        BENCHMARK.score(items[1], judged("scores", None, "missing_image")),
    ]
    totals = BENCHMARK.aggregate(scores)
    assert (totals.published, totals.strict, totals.missing) == (8.0, 4.0, 1)


def test_upstreams_documented_example(items):
    """8.613 with Multi-Object (weights 3/2/2/2), 8.842 as the shipped script drops it (3/2/2).

    Upstream states the totals only. These answers are chosen so that both come out: 1856.8 points over the first 210
    items, 468.6 over the 60 of Multi-Object.
    """
    others = iter([answer(9, 9, 9)] * 44 + [answer(10, 9, 8)] * 166)
    multi = iter([answer(8, 9, 8)] * 3 + [answer(8, 8, 7)] * 57)
    # Equal means in all types but Multi-Object are not needed: the weights follow the numbers of items.
    scores = [
        BENCHMARK.score(item, judged("scores", next(multi if item.tag == "Multi-Object" else others))) for item in items
    ]
    totals = BENCHMARK.aggregate(scores)
    assert round(totals.published, 3) == 8.613
    assert round(totals.others["as_shipped"], 3) == 8.842
    assert totals.published == pytest.approx(totals.strict) == pytest.approx(sum(s.strict for s in scores) / 270)
    assert totals.notes == []


def test_unknown_types_are_refused(tmp_path):
    with pytest.raises(BenchmarkDataError, match="line 1: unknown type 'TWO_OBJECT'"):
        BENCHMARK.load(write_lines(tmp_path / "rows.jsonl", [row(1, "TWO_OBJECT")]))
    with pytest.raises(BenchmarkDataError, match="'1' more than once"):
        BENCHMARK.load(write_lines(tmp_path / "rows.jsonl", [row(1, "TIME"), row(1, "SIZE")]))


def test_the_official_file_is_read_completely(official):
    items = BENCHMARK.load(official)
    assert [item.id for item in items] == [str(number) for number in range(1, 271)]
    assert Counter(item.tag for item in items) == dict(
        zip(BENCHMARK.tags, (90, 60, 60, 60), strict=True)  # as SPEC.md §2.1 counts them
    )
