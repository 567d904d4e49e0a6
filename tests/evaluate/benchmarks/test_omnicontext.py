"""OmniContext: three layouts of the data, both scores, both averages."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echo4o.evaluate.benchmark import BenchmarkDataError, ItemScore, JudgeImage
from echo4o.evaluate.benchmarks.omnicontext import OmniContext
from tests.evaluate.benchmarks.judging import judged, picture, text_of

BENCHMARK = OmniContext()
TASKS = {"single_object": 1, "multi_character": 2, "scene_character_object": 3}


@pytest.fixture
def folder(tmp_path):
    """What upstream's arrow2json writes."""
    rows = []
    for task, num_references in TASKS.items():
        names = [f"0001_{i}.jpg" for i in range(num_references)]
        for i, name in enumerate(names):
            picture(tmp_path / "images" / task / name, color=(50 * i, 90, 30))
        rows.append({"id": "0001", "task_type": task, "ori_img": names, "ins_en": f"Draw them together ({task})."})
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def table(folder):
    """The rows as the hub's data set has them."""
    rows = []
    for item in BENCHMARK.load(folder):
        images = [{"bytes": path.read_bytes(), "path": None} for path in item.references]
        row = {"key": item.fields["key"], "task_type": item.tag, "instruction": item.prompt, "input_images": images}
        rows += [row | {"instruction_language": language} for language in ("en", "zh")]
    return pa.Table.from_pylist(rows)


def test_upstreams_folder(folder):
    items = BENCHMARK.load(folder)
    assert [(item.id, len(item.references)) for item in items] == [(f"{task}-0001", n) for task, n in TASKS.items()]
    assert [path.name for path in items[2].references] == ["0001_0.jpg", "0001_1.jpg", "0001_2.jpg"]
    assert BENCHMARK.image_name(items[2]) == "scene_character_object/0001.png"


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
def test_tables_with_images_in_them(folder, table, form, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("cache")))
    data = tmp_path_factory.mktemp("data") / "train"
    data.mkdir()
    if form == "parquet":
        pq.write_table(table, data / "train-00000-of-00001.parquet")
    else:
        make = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with make(str(data / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
    items = BENCHMARK.load(data.parent)
    expected = BENCHMARK.load(folder)
    assert [(item.id, item.prompt, item.tag) for item in items] == [(i.id, i.prompt, i.tag) for i in expected]
    for item, other in zip(items, expected, strict=True):
        assert [p.read_bytes() for p in item.references] == [p.read_bytes() for p in other.references]
    assert BENCHMARK.load(data.parent) == items, "the second time the images are there"


def test_the_hub(hub, table, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    with pytest.raises(BenchmarkDataError, match="OmniGen2/OmniContext.*or pass a folder"):
        BENCHMARK.load(None)
    pq.write_table(table, tmp_path / "rows.parquet")
    files = {"data/train.parquet": (tmp_path / "rows.parquet").read_bytes(), "README.md": b"not wanted"}
    hub.add("OmniGen2/OmniContext", files, kind="datasets")
    items = BENCHMARK.load(None)
    assert len(items) == 3
    assert all(str(tmp_path / "home") in str(path) for item in items for path in item.references)
    assert not any("README" in request for request in hub.requests)


def test_questions_show_references_then_the_result(folder):
    plain, scene = (BENCHMARK.load(folder)[i] for i in (1, 2))
    following, consistency = BENCHMARK.questions(plain)
    assert (following.name, consistency.name) == ("PF", "SC")
    images = [part for part in following.parts if isinstance(part, JudgeImage)]
    assert [image.path for image in images] == [*plain.references, "result"]
    assert all(image.max_pixels == 1024**2 and image.stride == 16 for image in images[:-1])
    assert images[-1] == JudgeImage()
    assert plain.prompt in text_of(following)
    for question, other in zip(BENCHMARK.questions(plain), BENCHMARK.questions(scene), strict=True):
        assert "scene" not in text_of(question).split("Instruction:")[0]
        assert "scene" in text_of(other).split("Instruction:")[0]


def test_an_items_score_is_the_geometric_mean(folder):
    item = BENCHMARK.load(folder)[0]
    both = judged("PF", {"score": 9, "reasoning": ""}) | judged("SC", {"score": 4, "reasoning": ""})
    score = BENCHMARK.score(item, both)
    assert (score.strict, score.published, score.parts) == (6.0, 6.0, {"PF": 9.0, "SC": 4.0})
    for bad in (judged("SC", None, "parse_error"), judged("SC", None, "missing_image")):
        score = BENCHMARK.score(item, both | bad)
        assert (score.strict, score.published, score.status) == (0.0, None, bad["SC"].status)


def test_repeated_calls_are_averaged(folder):
    thrice = OmniContext(repeats=3)
    item = thrice.load(folder)[0]
    names = [question.name for question in thrice.questions(item)]
    assert names == ["PF-1", "PF-2", "PF-3", "SC-1", "SC-2", "SC-3"]
    judgements = {}
    for name, value in zip(names, (8, 8, 11 - 3, 1, 2, 3), strict=True):
        judgements |= judged(name, {"score": value, "reasoning": ""})
    assert thrice.score(item, judgements).strict == 4.0


def test_averages_over_eight_and_six_types():
    values = {tag: (9.0 if tag.startswith("single_") else 5.0) for tag in BENCHMARK.tags}
    scores = [
        ItemScore(f"{tag}{i}", tag, value, value, {"PF": value, "SC": value})
        for tag, value in values.items()
        for i in range(2 if tag == "multi_object" else 1)
    ]
    totals = BENCHMARK.aggregate(scores)
    assert totals.published == totals.strict == totals.others["PF"] == 6.0
    assert totals.others["average_of_6"] == totals.others["average_of_6_strict"] == 5.0


def test_the_size_is_explicit():
    assert (BENCHMARK.settings["height"], BENCHMARK.settings["width"]) == (1024, 1024)
    for size in ("first", "last"):
        settings = OmniContext(size=size).settings
        assert settings["size_from"] == size and "height" not in settings
    with pytest.raises(ValueError, match="use fixed, first or last"):
        OmniContext(size="largest")


def test_bad_data_is_named(folder, tmp_path):
    rows = json.loads((folder / "metadata.json").read_text())
    for change, message in (
        ({"ori_img": ["none.jpg"]}, "none.jpg does not exist"),
        ({"ori_img": ["../../metadata.json"]}, "leads out of"),
        ({"ori_img": []}, "no reference image"),
        ({"id": "a/b"}, "cannot be part of a file name"),
        ({"id": "0001", "task_type": "single_object"}, "more than once"),
    ):
        (folder / "metadata.json").write_text(json.dumps([rows[0], rows[1] | change]))
        if "task_type" in change:
            picture(folder / "images" / "single_object" / "0001_1.jpg")
        with pytest.raises(BenchmarkDataError, match=message):
            BENCHMARK.load(folder)
    with pytest.raises(BenchmarkDataError, match=r"metadata\.json"):
        BENCHMARK.load(folder / "images")


def test_a_broken_image_in_a_table_is_named(table, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    rows = table.to_pylist()
    rows[2]["input_images"][0]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(BenchmarkDataError, match="row 3: no image"):
        BENCHMARK.load(tmp_path)
