"""DPG-Bench: its csv, dependent questions, the grids and the result file of its script."""

import csv

import pytest
from PIL import Image

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.benchmarks.dpg import DPGBench, write_grid
from tests.evaluate.benchmarks.judging import judged, picture, text_of, write_lines

BENCHMARK = DPGBench()
COLUMNS = [
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
]


def question(item, number, dependency, asked):
    values = (item, f"A long text on {item}.", "", number, dependency, "entity", "whole", "entity - whole (x)", asked)
    return dict(zip(COLUMNS, values, strict=True))


ROWS = [
    question("7", 1, "0", "Is there a lamp?"),
    question("7", 2, "1", "Is the lamp green?"),
    question("7", 3, "1,2", "Is the green lamp lit?"),
    question("7", 4, "0", "Is it night?"),
    question("parti9", 1, "0", "Is there a fox?"),
    question("parti9", 2, "1", "Is the fox asleep?"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("7", "parti9"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"A long text on {name}.\n")
    with open(tmp_path / "dpg_bench.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path


def test_prompts_from_each_layout(folder):
    items = BENCHMARK.load(folder)
    assert [(item.id, item.prompt, item.num_images) for item in items] == [
        ("7", "A long text on 7.", 4),
        ("parti9", "A long text on parti9.", 4),
    ]
    assert BENCHMARK.image_name(items[0], 2) == "7_2.png"
    texts = BENCHMARK.load(folder / "prompts")
    assert [item.id for item in texts] == ["7", "parti9"] and BENCHMARK.questions(texts[0]) == []
    assert [item.id for item in BENCHMARK.load(folder / "dpg_bench.csv")] == ["7", "parti9"]
    lines = write_lines(folder / "prompts.jsonl", [{"item_id": 7, "prompt": "A long text on 7."}])
    assert [item.id for item in BENCHMARK.load(lines)] == ["7"]


def test_a_no_makes_dependent_answers_a_no(folder):
    item = BENCHMARK.load(folder)[0]
    asked = BENCHMARK.questions(item)
    assert [one.name for one in asked] == ["image_0", "image_1", "image_2", "image_3"]
    assert "q3: Is the green lamp lit?" in text_of(asked[0]) and asked[2].parts[-1].number == 2
    answers = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 0), (1, 1, 0, 1)]
    judgements = {}
    for number, answer in enumerate(answers):
        judgements |= judged(f"image_{number}", {f"q{i + 1}": value for i, value in enumerate(answer)})
    score = BENCHMARK.score(item, judgements)
    assert score.strict == (1 + 1 / 4 + 1 / 4 + 3 / 4) / 4
    # The script starts behind the csv's first line: question 1 of the first item does not exist for it.
    assert score.published == pytest.approx((1 + 1 + 1 / 3 * 0 + 2 / 3) / 4)
    judgements["image_3"] = judged("image_3", None, "missing_image")["image_3"]
    assert BENCHMARK.score(item, judgements).strict == (1 + 1 / 4 + 1 / 4) / 4
    assert BENCHMARK.score(item, judgements).status == "missing_image"


def test_results_of_the_script(folder):
    items = BENCHMARK.load(folder)
    path = folder / "dpg-bench_results.txt"
    path.write_text(
        "/data/run, 2/7.png, 0.5, 1.0, 0.75, 0.75, 0.75\n"
        "Model: run\nL1 category scores:\n\tentity: 75.0\nImage path: /data/run, 2\nDPG-Bench score: 75.0\n"
    )
    scores = BENCHMARK.read_results(path, items)
    assert (scores[0].published, scores[0].parts["image_1"], scores[1].status) == (0.75, 1.0, "missing_image")
    totals = BENCHMARK.aggregate(scores)
    assert (totals.published, totals.strict) == (0.75, 0.375)
    path.write_text("nothing of it")
    with pytest.raises(BenchmarkDataError, match="has no line"):
        BENCHMARK.read_results(path, items)


def test_grids_are_row_by_row(tmp_path):
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]
    pictures = [picture(tmp_path / f"{i}.png", (16, 16), color) for i, color in enumerate(colors)]
    write_grid(pictures, tmp_path / "grids" / "7.png")
    with Image.open(tmp_path / "grids" / "7.png") as sheet:
        assert sheet.size == (32, 32)
        assert [sheet.getpixel(at) for at in ((2, 2), (20, 2), (2, 20), (20, 20))] == colors
    with pytest.raises(BenchmarkDataError, match="differ in size"):
        write_grid([pictures[0], picture(tmp_path / "x.png", (8, 8))], tmp_path / "grids" / "8.png")


def test_bad_data_is_named(folder):
    text = (folder / "dpg_bench.csv").read_text()
    (folder / "dpg_bench.csv").write_text(text.replace('"1,2"', "one"))
    with pytest.raises(BenchmarkDataError, match=r"csv, line 4: no number in"):
        BENCHMARK.load(folder)
    (folder / "dpg_bench.csv").write_text(text.replace("parti9", "parti8"))
    with pytest.raises(BenchmarkDataError, match="no questions on parti9"):
        BENCHMARK.load(folder)
    (folder / "dpg_bench.csv").write_text(text.replace("dependency", "parents", 1))
    with pytest.raises(BenchmarkDataError, match="no column 'dependency'"):
        BENCHMARK.load(folder)
