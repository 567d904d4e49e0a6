"""GenEval++: the checklist, the published formula, and upstream's documented example."""

import dataclasses
from collections import Counter

import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError, ItemScore, JudgeImage
from echo4o.evaluate.benchmarks.geneval_pp import GenEvalPlusPlus
from tests.evaluate.benchmarks.judging import judged, text_of, write_lines

ROWS = [
    {
        "tag": "color_attr",
        "include": [{"class": "bus", "count": 1, "color": "pink"}, {"class": "kite", "count": 1, "color": "brown"}],
        "prompt": "A photo of a pink bus and a brown kite",
    },
    {
        "tag": "size_spatial_attr",
        "include": [
            {"class": "bench", "count": 1, "size": "larger", "region": "above"},
            {"class": "computer mouse", "count": 3, "region": "below"},
        ],
        "prompt": "A photo of a larger bench on the above and three computer mouses on the below",
    },
    {
        "tag": "counting",
        "include": [{"class": "sheep", "count": 4}],
        "exclude": [{"class": "sheep", "count": 5}],
        "prompt": "A photo of four sheeps",
    },
]
BENCHMARK = GenEvalPlusPlus()


@pytest.fixture
def items(tmp_path):
    return BENCHMARK.load(write_lines(tmp_path / "Geneval++.jsonl", ROWS))


def test_items_are_named_by_their_line(items):
    assert [(item.id, item.tag, BENCHMARK.image_name(item)) for item in items] == [
        ("1", "color_attr", "1.png"),
        ("2", "size_spatial_attr", "2.png"),
        ("3", "counting", "3.png"),
    ]
    assert items[0].prompt == ROWS[0]["prompt"]


def test_checklist_follows_upstreams_grammar(items):
    assert BENCHMARK.checklist(items[0]).split("\n")[1:] == [
        "- pink-colored 1 bus present in the image.",
        "- brown-colored 1 kite present in the image.",
    ]
    assert BENCHMARK.checklist(items[1]).split("\n")[1:] == [
        "- larger 1 bench located in the above part of the image.",
        "- 3 computer mice located in the below part of the image.",
    ]
    assert BENCHMARK.checklist(items[2]).split("\n")[1:] == [
        "- 4 sheep present in the image.",
        "- No more than 4 sheep in the image.",
    ]


def test_the_published_plurals_are_an_option(items):
    published = GenEvalPlusPlus(plurals="published")
    assert "3 computer mouses" in published.checklist(items[1])
    assert "4 sheeps present" in published.checklist(items[2])


def test_the_question_has_prompt_checklist_picture_and_room_for_a_reason(items):
    (question,) = BENCHMARK.questions(items[1])
    assert items[1].prompt in text_of(question) and "3 computer mice" in text_of(question)
    assert question.parts[-1] == JudgeImage()
    assert question.max_tokens >= 512
    assert list(question.answer.schema["properties"])[0] == "correct"


def test_missing_and_failed_are_wrong_but_counted_by_themselves(items):
    right = BENCHMARK.score(items[0], judged("verdict", {"correct": 1, "reason": ""}))
    assert (right.published, right.strict, right.status) == (1.0, 1.0, "ok")
    for status in ("missing_image", "api_error", "parse_error"):
        score = BENCHMARK.score(items[0], judged("verdict", None, status))
        assert (score.published, score.strict, score.status) == (0.0, 0.0, status)
    assert BENCHMARK.score(items[0], {}).status == "not_judged"

    scores = [right] + [
        dataclasses.replace(BENCHMARK.score(items[0], judged("verdict", None, status)), item=status)
        for status in ("missing_image", "api_error")
    ]
    totals = BENCHMARK.aggregate(scores)
    assert (totals.failed, totals.missing, totals.per_tag["color_attr"].failed) == (1, 1, 1)
    assert totals.published == 0.3333 and totals.strict == pytest.approx(1 / 3)
    assert totals.others["of_judged_only"] == 1.0
    assert any("3 of 280 items" in note for note in totals.notes)


def test_upstreams_documented_example():
    """Eval.md: 34, 25, 25, 30, 34, 31 and 26 of 40 right are 73.21 %."""
    right = dict(zip(BENCHMARK.tags, (34, 25, 25, 30, 34, 31, 26), strict=True))
    scores = [
        ItemScore(f"{tag}{i}", tag, float(i < count), float(i < count))
        for tag, count in right.items()
        for i in range(40)
    ]
    totals = BENCHMARK.aggregate(scores)
    assert totals.published == 0.7321
    assert round(totals.others["all_samples"], 4) == 0.7321
    assert totals.per_tag["spatial_count_attr"].published == 0.625
    assert totals.notes == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"tag": None}, "'tag' is NoneType"),
        ({"include": []}, "'include' is empty"),
        ({"include": [{"class": "bus"}]}, "no 'count'"),
        ({"include": [{"class": "bus", "count": 0}]}, "0 × bus"),
        ({"include": [{"class": "bus", "count": True}]}, "'count' is bool"),
        ({"include": [{"class": "bus", "count": 1, "colour": "red"}]}, "'colour'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write_lines(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(BenchmarkDataError, match=message) as error:
        BENCHMARK.load(path)
    assert "line 2" in str(error.value)


def test_without_a_path_the_source_is_named(tmp_path):
    with pytest.raises(BenchmarkDataError, match=r"Geneval\+\+\.jsonl"):
        BENCHMARK.load(None)
    with pytest.raises(BenchmarkDataError, match="holds none of"):
        BENCHMARK.load(tmp_path)


def test_the_official_file_is_read_completely(official):
    items = BENCHMARK.load(official)
    assert Counter(item.tag for item in items) == dict.fromkeys(BENCHMARK.tags, 40)
    wanted = [entry for item in items for entry in item.fields["include"]]
    assert len(wanted) == 591
    assert Counter(entry.get("region") for entry in wanted)["above"] == 70
    assert sum(len(item.fields["exclude"]) for item in items) == 40
    assert all(len(BENCHMARK.questions(item)) == 1 for item in items)
