"""What all benchmarks have in common."""

import pytest

from echo4o.evaluate.benchmark import Judgement, find_image
from echo4o.evaluate.benchmarks import BENCHMARKS, benchmark, options_of
from echo4o.evaluate.benchmarks.plurals import plural
from echo4o.generate.presets import preset
from tests.evaluate.benchmarks.judging import picture

SCALES = {"0-1": (0, 1), "0-10": (0, 10), "1-5": (1, 5), "percent": (0, 100)}


@pytest.mark.parametrize("one", BENCHMARKS.values(), ids=lambda one: one.name)
def test_every_benchmark_is_complete(one):
    low, high = SCALES[one.scale]
    assert one.lowest == low
    assert one.title and one.source and one.caveats
    assert all(low <= value <= high for value in one.published_rows.values())
    settings = dict(one.settings)
    sizes = {name: settings.pop(name) for name in ("height", "width") if name in settings}
    assert preset(settings.pop("preset")).changed(**settings)
    assert sizes in ({}, {"height": 1024, "width": 1024})


def test_options_are_checked():
    assert benchmark("omnicontext", size="last").settings["size_from"] == "last"
    assert BENCHMARKS["omnicontext"].settings["width"] == 1024, "the registry's own stays"
    assert options_of(BENCHMARKS["geneval++"]) == {"plurals": "correct"}
    with pytest.raises(ValueError, match=r"did you mean geneval\+\+"):
        benchmark("geneval+")
    with pytest.raises(ValueError, match="omnicontext has no option 'sizes'; it has size, repeats, language"):
        benchmark("omnicontext", sizes="last")


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("bus", "buses"),
        ("wine glass", "wine glasses"),
        ("bench", "benches"),
        ("toothbrush", "toothbrushes"),
        ("knife", "knives"),
        ("person", "people"),
        ("computer mouse", "computer mice"),
        ("sheep", "sheep"),
        ("scissors", "scissors"),
        ("hot dog", "hot dogs"),
        ("toy", "toys"),
        ("berry", "berries"),
        ("vase", "vases"),
    ],
)
def test_plurals(name, several):
    assert plural(name) == several


def test_images_are_found_under_other_suffixes(tmp_path):
    picture(tmp_path / "a" / "1.2.jpg")
    assert find_image(tmp_path, "a/1.2.png") == tmp_path / "a" / "1.2.jpg"
    picture(tmp_path / "a" / "1.2.png")
    assert find_image(tmp_path, "a/1.2.png") == tmp_path / "a" / "1.2.png"
    assert find_image(tmp_path, "a/2.png") is None


def test_a_judgement_without_answer_never_scores_above_the_lowest():
    """Whatever the benchmark: a failure gives no points in the strict score."""
    from echo4o.evaluate.benchmark import Item

    fields = {"include": [], "exclude": [], "note": "", "key": "k", "type": "physics", "explanation": "", "truth": None}
    fields |= {"questions": [], "consistency_free": False, "intersection": False}
    for one in BENCHMARKS.values():
        tag = one.tags[0] if one.tags else ""
        item = Item("1", "draw", (), tag, fields)
        names = ["verdict", "scores", "PF", "SC", "PQ", "consistency", "quality", "instruction", "reasoning"]
        for status in ("missing_image", "api_error", "parse_error"):
            score = one.score(item, {name: Judgement(one.name, "1", name, status) for name in names})
            assert score.strict == one.lowest and score.status != "ok"
            assert one.aggregate([score]).strict == one.lowest
