"""GEdit, ImgEdit, KRIS and RISE: where their data lies, what the judge sees, and their formulas."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError, ItemScore, JudgeImage
from echo4o.evaluate.benchmarks.gedit import GEdit
from echo4o.evaluate.benchmarks.imgedit import ImgEdit
from echo4o.evaluate.benchmarks.kris import CATEGORY_OF, Kris
from echo4o.evaluate.benchmarks.rise import Rise
from tests.evaluate.benchmarks.judging import judged, picture, text_of


def shown(question):
    """Names of the images in a question, in order."""
    images = [part for part in question.parts if isinstance(part, JudgeImage)]
    return [image.path if isinstance(image.path, str) else image.path.name for image in images]


# ---------------------------------------------------------------- GEdit


@pytest.fixture
def gedit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    data = picture(tmp_path / "source.png").read_bytes()
    rows = [
        {
            "key": f"k{i}",
            "task_type": task,
            "instruction": f"Change it {i}",
            "instruction_language": language,
            "input_image": {"bytes": data, "path": None},
            "input_image_raw": {"bytes": data, "path": None},
            "Intersection_exist": i == 0,
        }
        for i, task in enumerate(["subject-add", "text_change"])
        for language in ("en", "cn")
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def test_gedit(gedit):
    benchmark = GEdit()
    items = benchmark.load(gedit)
    assert [item.id for item in items] == ["subject-add-en-k0", "text_change-en-k1"]
    assert len(GEdit(language="cn").load(gedit)) == 2
    assert benchmark.image_name(items[0]) == "fullset/subject-add/en/k0.png"
    ((name, source),) = benchmark.sidecars(items[0]).items()
    assert name == "fullset/subject-add/en/k0_SRCIMG.png" and source == items[0].references[0]

    semantics, quality = benchmark.questions(items[0])
    assert shown(semantics) == ["k0.png", "result"] and shown(quality) == ["result"]
    assert quality.parts[-1].size_of == items[0].references[0]
    assert items[0].prompt in text_of(semantics) and items[0].prompt not in text_of(quality)

    judgements = judged("SC", {"edit_success": 9, "no_overediting": 4, "reasoning": ""})
    judgements |= judged("PQ", {"naturalness": 9, "no_artifacts": 10, "reasoning": ""})
    scores = [benchmark.score(item, judgements) for item in items]
    assert scores[0].published == 6.0
    scores[1] = ItemScore(items[1].id, items[1].tag, 2.0, 2.0, {"SC": 2.0, "PQ": 2.0, "intersection": 0.0})
    totals = benchmark.aggregate(scores)
    assert (totals.published, totals.others) == (4.0, {"SC": 3.0, "PQ": 5.5, "intersection": 6.0})


# ---------------------------------------------------------------- ImgEdit


def test_imgedit(tmp_path):
    benchmark = ImgEdit()
    picture(tmp_path / "animal" / "1.jpg")
    data = {str(k): {"id": "animal/1.jpg", "prompt": f"Edit {k}", "edit_type": kind} for k, kind in enumerate("abb")}
    (tmp_path / "singleturn.json").write_text(json.dumps(data))
    items = benchmark.load(tmp_path)
    assert [(item.id, item.tag) for item in items] == [("0", "a"), ("1", "b"), ("2", "b")]
    (question,) = benchmark.questions(items[0])
    assert shown(question) == ["1.jpg", "result"]
    answers = [(5, 4, 4), (1, 1, 1), (2, 2, 3)]
    scores = [
        benchmark.score(item, judged("scores", dict(zip(("compliance", "naturalness", "integrity"), a, strict=True))))
        for item, a in zip(items, answers, strict=True)
    ]
    assert [score.published for score in scores] == [4.33, 1.0, 2.33]
    totals = benchmark.aggregate(scores)
    assert totals.published == pytest.approx((4.33 + 1 + 2.33) / 3)
    assert totals.others["mean_of_types"] == pytest.approx((4.33 + 3.33 / 2) / 2)
    missing = benchmark.score(items[0], judged("scores", None, "missing_image"))
    assert (missing.published, missing.strict) == (None, 1.0)


# ---------------------------------------------------------------- KRIS


@pytest.fixture
def kris(tmp_path):
    folder = tmp_path / "KRIS_Bench"
    rows = {
        "color_change": {"ori_img": "1.jpg", "gt_img": "", "ins_en": "Paint the door blue"},
        "physics": {"ori_img": "1.jpg", "ins_en": "Let go of the ball", "explain_en": "It falls."},
        "viewpoint_change": {"ori_img": "1.jpg", "gt_img": "gt.jpg", "ins_en": "Seen from above"},
        "temporal_prediction": {"ori_img": ["1-1.jpg", "1-2.jpg", "1-4.jpg"], "ins_en": "Frame 3"},
        "multi-element_composition": {"ori_img": ["1-1.jpg", "1-2.jpg"], "ins_en": "Both in one"},
    }
    for kind, row in rows.items():
        names = [row["ori_img"]] if isinstance(row["ori_img"], str) else row["ori_img"]
        for name in [*names, row.get("gt_img")]:
            if name:
                picture(folder / kind / name)
        (folder / kind / "annotation.json").write_text(json.dumps({"1": row}))
    return tmp_path


def test_kris_shows_what_each_type_needs(kris):
    benchmark = Kris()
    items = {item.fields["type"]: item for item in benchmark.load(kris)}
    assert len(items) == 5
    assert benchmark.image_name(items["physics"]) == "physics/1.png"
    asked = {kind: {one.name: one for one in benchmark.questions(item)} for kind, item in items.items()}
    assert set(asked["color_change"]) == {"consistency", "quality", "instruction"}
    assert set(asked["physics"]) == {"consistency", "quality", "knowledge"}
    assert shown(asked["color_change"]["consistency"]) == ["1.jpg", "result"]
    assert shown(asked["color_change"]["quality"]) == ["result"]
    assert shown(asked["viewpoint_change"]["instruction"]) == ["1.jpg", "result", "gt.jpg"]
    assert shown(asked["temporal_prediction"]["instruction"]) == ["1-1.jpg", "1-2.jpg", "result", "1-4.jpg"]
    assert shown(asked["multi-element_composition"]["instruction"]) == ["1-1.jpg", "1-2.jpg", "result"]
    assert "It falls." in text_of(asked["physics"]["knowledge"])
    assert "It falls." not in text_of(asked["physics"]["consistency"])


def test_kris_averages_every_single_value(kris):
    benchmark = Kris()
    items = {item.fields["type"]: item for item in benchmark.load(kris)}
    three = judged("consistency", {"consistency": 5}) | judged("quality", {"quality": 5})
    three |= judged("instruction", {"instruction": 5})
    four = judged("consistency", {"consistency": 1}) | judged("quality", {"quality": 1})
    four |= judged("knowledge", {"instruction": 1, "knowledge": 3})
    scores = [benchmark.score(items["color_change"], three), benchmark.score(items["physics"], four)]
    assert [score.published for score in scores] == [100.0, 12.5]
    totals = benchmark.aggregate(scores)
    assert totals.published == totals.strict == pytest.approx((300 + 50) / 7)
    assert totals.others["factual"] == 100.0 and totals.others["conceptual"] == 12.5
    del three["quality"]
    partial = benchmark.score(items["color_change"], three)
    assert (partial.published, partial.strict, partial.status) == (100.0, pytest.approx(200 / 3), "not_judged")


def test_kris_knows_twenty_types():
    assert len(CATEGORY_OF) == 20


# ---------------------------------------------------------------- RISE


@pytest.fixture
def rise(tmp_path):
    rows = [
        {"index": "t1", "category": "temporal_reasoning", "reference": "It is winter.", "reasoning_img": 1},
        {"index": "s1", "category": "spatial_reasoning", "reference": "Assembled.", "consistency_free": 1},
        {"index": "l1", "category": "logical_reasoning", "reference_txt": "The path."},
        {"index": "l2", "category": "logical_reasoning", "reference_img": "ref/l2.png", "reasoning_wo_ins": 1},
    ]
    for row in rows:
        row |= {"subtask": "x", "instruction": f"Think of {row['index']}", "image": f"img/{row['index']}.png"}
        picture(tmp_path / "data" / row["image"])
    picture(tmp_path / "data" / "ref" / "l2.png", color=(1, 2, 3))
    (tmp_path / "datav2_total_w_subtask.json").write_text(json.dumps(rows))
    return Rise().load(tmp_path)


def answers(**values):
    judgements = {}
    for name, value in values.items():
        judgements |= judged(name, {"final_score": value, "reason": ""})
    return judgements


def test_rise_asks_by_kind(rise):
    asked = [{one.name: one for one in Rise().questions(item)} for item in rise]
    assert [list(one) for one in asked] == [
        ["consistency", "reasoning", "quality"],
        ["reasoning", "quality"],
        ["consistency", "reasoning"],
        ["consistency", "reasoning"],
    ]
    assert shown(asked[0]["reasoning"]) == ["t1.png", "result"]
    assert shown(asked[1]["reasoning"]) == ["result"]
    assert shown(asked[3]["reasoning"]) == ["l2.png", "result"]
    assert asked[3]["reasoning"].parts[1].path.parent.name == "ref"
    assert "The path." in text_of(asked[2]["reasoning"]) and "Think of l2" not in text_of(asked[3]["reasoning"])
    assert asked[2]["reasoning"].answer.schema["properties"]["final_score"]["enum"] == [0, 1]
    assert all(part.max_side == 768 for part in asked[0]["quality"].parts if isinstance(part, JudgeImage))


@pytest.mark.parametrize(
    ("index", "values", "percent"),
    [
        (0, {"consistency": 5, "reasoning": 5, "quality": 5}, 100.0),
        (0, {"consistency": 4, "reasoning": 3, "quality": 5}, 25 * (1.2 + 1.5 + 1.0 - 1)),
        (0, {"consistency": 5, "reasoning": 1, "quality": 5}, 25 * ((1.5 + 0.5 + 1.0) / 2 - 1)),
        (0, {"consistency": 1, "reasoning": 1, "quality": 1}, 0.0),
        (1, {"reasoning": 5, "quality": 4}, 25 * (4.0 + 0.8 - 1)),
        (2, {"consistency": 1, "reasoning": 1}, 100.0),
        (2, {"consistency": 0, "reasoning": 1}, 25 * (0.3 + 3.5 - 1)),
        (2, {"consistency": 1, "reasoning": 0}, 25 * ((1.5 + 0.7) / 2 - 1)),
    ],
)
def test_rise_scores(rise, index, values, percent):
    score = Rise().score(rise[index], answers(**values))
    assert score.published == score.strict == pytest.approx(percent)


def test_rise_totals_and_what_upstreams_table_makes_of_them(rise):
    benchmark = Rise()
    scores = [
        benchmark.score(rise[0], answers(consistency=5, reasoning=5, quality=5)),
        benchmark.score(rise[1], answers(reasoning=5, quality=5)),
        benchmark.score(rise[2], answers(consistency=0, reasoning=1)),
    ]
    totals = benchmark.aggregate(scores)
    assert totals.published == pytest.approx((100 + 100 + 70) / 3)
    assert totals.others["accuracy"] == pytest.approx(100 / 3)
    assert totals.others["as_shipped"] == pytest.approx(totals.published)
    scores[0] = benchmark.score(rise[0], answers(consistency=1, reasoning=5, quality=5))
    assert benchmark.aggregate(scores).others["as_shipped"] == pytest.approx(totals.published)


@pytest.mark.parametrize("benchmark", [GEdit(), ImgEdit(), Kris(), Rise()], ids=lambda b: b.name)
def test_a_folder_without_data_is_named(benchmark, tmp_path):
    with pytest.raises(BenchmarkDataError, match=str(tmp_path)):
        benchmark.load(tmp_path)
