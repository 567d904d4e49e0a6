"""Reports of run folders: totals, what is not hidden, and that no text of a prompt becomes code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from echo4o.checkpoint.hf.card import read_scores
from echo4o.evaluate.benchmark import Item, ItemScore
from echo4o.evaluate.benchmarks import benchmark
from echo4o.evaluate.report import ReportError, write_report
from echo4o.evaluate.run_folder import RunFolder
from echo4o.evaluate.scoring import write_scores
from tests.evaluate.report.runs import geneval_items, imagine_items, omnicontext_items, write_run

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> | `*bold*` \u202bصورة قطة\u202c 🐈'


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def statuses_of(item: Item) -> str:
    return {"2": "missing_image", "3": "api_error", "4": "parse_error"}.get(item.id, "ok")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run of two benchmarks, some of it failed, with its report beside it."""
    folder = tmp_path_factory.mktemp("runs") / "run-a"
    items = geneval_items(24)
    items[4] = replace(items[4], prompt=HOSTILE)
    write_run(folder, "geneval++", items, status=statuses_of)
    long = {"fantasy_fulfillment": 9, "identity_preservation": 8, "aesthetic_quality": 10}
    write_run(
        folder,
        "imagine-bench",
        imagine_items(24),
        status=statuses_of,
        answer=lambda item, question: {**long, "reason": "</p><script>alert(3)</script> " + "very long " * 60},
        facts={"model": "/home/somebody/models/mine", "images_from": "/home/somebody/models/mine"},
    )
    files = write_report([folder], folder)
    return folder, {path.name: path for path in files}


def test_all_files_are_there(reported):
    folder, files = reported
    assert list(files) == ["report.html", "report.md", "report.json", "scores_for_card.json"]
    assert all(path.parent == folder and path.stat().st_size for path in files.values())


def test_totals_equal_a_recount_of_the_judgements(reported):
    folder, files = reported
    content = json.loads(files["report.json"].read_text())["runs"][0]["benchmarks"]
    tags = {row["id"]: row["tag"] for row in lines(folder / "geneval++" / "items.jsonl")}
    right = Counter()
    for row in lines(folder / "geneval++" / "judgements.jsonl"):
        right[tags[row["item"]]] += row["status"] == "ok" and row["answer"]["correct"] == 1
    sizes = Counter(tags.values())
    assert content["geneval++"]["strict"] == pytest.approx(fmean(right[tag] / sizes[tag] for tag in sizes))
    assert {t: row["n"] for t, row in content["geneval++"]["per_tag"].items()} == dict(sizes)
    imagine = content["imagine-bench"]
    assert imagine["statuses"] == {"ok": 21, "missing_image": 1, "api_error": 1, "parse_error": 1}
    # Items 2, 3, 4 are of three types with six items each; all others have 0.8 · 8 + 0.2 · 10.
    assert imagine["per_tag"]["Attribute shift"]["strict"] == pytest.approx(8.4 * 5 / 6)
    assert imagine["usage"]["prompt_tokens"] == 24 * 900
    low, high = imagine["strict_interval"]
    assert low < imagine["strict"] < high


def test_the_page_needs_nothing_from_outside(reported):
    page = Page(reported[1]["report.html"])
    sources = [attributes.get("src") or "" for tag in ("img", "script", "iframe") for attributes in page.all(tag)]
    assert all(source.startswith("data:image/jpeg") for source in sources if source)
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not [a["href"] for a in page.all("a") if ":" in (a["href"] or "")]
    assert "@import" not in page.source and "url(" not in page.source
    assert "default-src 'none'" in page.source


def test_prompts_and_reasons_are_no_code(reported):
    page = Page(reported[1]["report.html"])
    assert len(page.all("script")) == 1
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert HOSTILE in page.text and "</p><script>alert(3)" in page.text
    assert 'dir="auto">&lt;script&gt;' in page.source


def test_every_picture_has_words(reported):
    page = Page(reported[1]["report.html"])
    assert len(page.all("img")) == 46
    assert all(image["alt"] for image in page.all("img"))
    assert sum("nopic" in (a.get("class") or "") for a in page.all("div")) == 2
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "").startswith("#")}
    assert {target.replace("%2B", "+") for target in targets} <= set(ids)


def test_failures_are_named(reported):
    page = Page(reported[1]["report.html"])
    markdown = reported[1]["report.md"].read_text()
    for words in ("image missing: 1", "judge not reached: 1", "reply unreadable: 1"):
        assert words in page.text and words in markdown
    assert "24 items instead of the official 280" in page.text and "24 items instead of the official 280" in markdown
    assert "somebody" not in reported[1]["report.json"].read_text()
    assert "somebody" not in page.source and "models/mine" in page.text  # no places of home folders


def test_markdown_tables_hold(reported, tmp_path):
    for line in reported[1]["report.md"].read_text().splitlines():
        if line.startswith("| GenEval++ "):
            assert line.replace("\\|", "").count("|") == 10
    folder = write_run(tmp_path / "a|b", "geneval++", [replace(i, tag="x | <y>") for i in geneval_items(3)])
    text = write_report([folder], tmp_path / "out")[1].read_text()
    assert "| x \\| &lt;y&gt; | a\\|b |" in text


def test_scores_for_the_card_are_read_by_it(reported):
    scores = read_scores(reported[1]["scores_for_card.json"])
    assert [score.benchmark for score in scores] == ["GenEval++", "Imagine-Bench"]
    # Types 3/2/2/2: (8.4 · 5 − 1)/6, since upstream counts a reply it cannot read as −1; 8.4; 8.4 without the missing
    # picture; 8.4 · 5/6.
    assert scores[1].score == 7.57 and scores[1].num_items == 24 and scores[1].judge == "judge-1"
    assert "strict 7.31" in scores[1].note and "not all 270 official items" in scores[1].note


def test_judging_that_is_not_finished_is_said(tmp_path):
    folder = write_run(
        tmp_path / "run", "geneval++", geneval_items(9), status=lambda i: "ok" if int(i.id) < 4 else "not_judged"
    )
    path = folder / "geneval++" / "judgements.jsonl"
    path.write_text(path.read_text() + '{"benchmark": "geneval++", "item": "5", "ques')  # it was killed
    files = write_report([folder], folder)
    assert json.loads(files[2].read_text())["runs"][0]["benchmarks"]["geneval++"]["partial"]
    assert "partial. 6 of 9 items not judged yet" in Page(files[0]).text
    assert "not judged yet: 6" in json.loads(files[3].read_text())[0]["note"]


def test_nothing_judged_yet_is_a_report_too(tmp_path):
    folder = write_run(tmp_path / "run", "imagine-bench", imagine_items(4), status=lambda item: "not_judged")
    files = write_report([folder], folder)
    assert json.loads(files[3].read_text()) == []
    assert "partial. 4 of 4 items" in Page(files[0]).text


def test_only_the_judge_of_the_run_counts(tmp_path):
    folder = write_run(
        tmp_path / "run", "geneval++", geneval_items(3), answer=lambda i, q: {"correct": 1, "reason": ""}
    )
    path = folder / "geneval++" / "judgements.jsonl"
    other = json.loads(path.read_text().splitlines()[0]) | {"judge": "judge-2", "answer": {"correct": 0, "reason": ""}}
    path.write_text(path.read_text() + json.dumps(other) + "\n")
    content = json.loads(write_report([folder], folder)[2].read_text())["runs"][0]["benchmarks"]["geneval++"]
    assert content["strict"] == 1.0 and content["judges"] == ["judge-1"]
    assert content["usage"]["prompt_tokens"] == 4 * 900  # paid for, too


def test_scores_of_a_program_come_from_its_file(tmp_path):
    items = [replace(item, num_images=4, id=f"{n:05d}") for n, item in enumerate(geneval_items(3))]
    folder = write_run(tmp_path / "run", "geneval", items)
    assert json.loads(write_report([folder], folder)[2].read_text())["runs"][0]["benchmarks"]["geneval"]["partial"]
    scores = [ItemScore(item.id, item.tag, 0.75, 0.75, {}) for item in items]
    write_scores(RunFolder(folder / "geneval"), benchmark("geneval"), scores, None)
    files = write_report([folder], folder)
    content = json.loads(files[2].read_text())["runs"][0]["benchmarks"]["geneval"]
    assert content["strict"] == 0.75 and not content["partial"] and content["judges"] == []
    assert len(Page(files[0]).all("img")) == 12


def test_references_are_shown_in_order(tmp_path):
    items = omnicontext_items(3, tmp_path / "refs")
    folder = write_run(tmp_path / "run", "omnicontext", items)
    page = Page(write_report([folder], tmp_path / "out")[0])
    alts = [image["alt"] for image in page.all("img")]
    assert [alt for alt in alts if alt.endswith("key2")] == [f"Reference {n} of item key2" for n in (1, 2, 3)]


def test_one_benchmark_of_a_run_can_be_named(tmp_path):
    folder = write_run(tmp_path / "run", "geneval++", geneval_items(3))
    content = json.loads(write_report([folder / "geneval++"], tmp_path / "out")[2].read_text())
    assert content["runs"][0]["name"] == "geneval++"
    assert content["runs"][0]["benchmarks"]["geneval++"]["items"][0]["images"] == ["images/1.png"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("judgements.jsonl", '{"item": 3}\n', "judgements.jsonl, line 1"),
        ("items.jsonl", "{]\n", "items.jsonl, line 1: no JSON"),
        ("items.jsonl", '{"id": "1"}\n', "items.jsonl, line 1: no item"),
        ("items.jsonl", "", "holds no items"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", '{"benchmark": "geneval+"}', "did you mean geneval++"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    folder = write_run(tmp_path / "run", "geneval++", geneval_items(3))
    (folder / "geneval++" / name).write_text(text)
    with pytest.raises(ReportError, match=words.replace("+", r"\+")):
        write_report([folder], folder)


def test_folders_without_an_evaluation_are_refused(tmp_path):
    with pytest.raises(ReportError, match="holds no evaluation"):
        write_report([tmp_path], tmp_path)
    with pytest.raises(ReportError, match="at least one"):
        write_report([], tmp_path)
    folder = write_run(tmp_path / "run", "geneval++", geneval_items(3))
    with pytest.raises(ReportError, match="named twice"):
        write_report([folder, folder / "."], tmp_path)
