"""The stages of `echo4o eval`, together and alone."""

import json
from pathlib import Path

import pytest

from echo4o.evaluate.client import JudgeError, JudgeOptions
from echo4o.evaluate.command import Evaluation, Prices, evaluate, list_benchmarks
from echo4o.evaluate.run_folder import RunFolderError
from echo4o.generate.options import ModelOptions
from tests.evaluate.judge_server import JudgeServer
from tests.evaluate.small_run import evaluation, lines_of, scores_of, write_images, write_prompts

TINY = Path(__file__).resolve().parents[2] / "data_examples" / "tiny_bagel"
SMALL = {"height": 32, "width": 32, "num_timesteps": 3, "cfg_text_scale": 2.0}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def run(folder, server, **changed) -> tuple[int, str]:
    said: list[str] = []
    status = evaluate(evaluation(folder, server, **changed), said.append)
    return status, "\n".join(said)


def test_from_prompts_to_a_report(tmp_path, server):
    drawn = {"images": None, "model": ModelOptions(TINY), "settings": SMALL, "report": True}
    status, said = run(tmp_path, server, **drawn, prices=Prices(2.0, 8.0))
    assert status == 0
    assert "6 drawn, 0 were there before" in said and "judging 6 questions by" in said and "cost 0.0" in said
    folder = tmp_path / "run" / "geneval++"
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["model"], facts["seed"], facts["judge"]) == ("tiny_bagel", 0, "test-judge-2026-01-01")
    assert facts["settings"]["height"] == 32 and facts["judge_served_as"] == ["test-judge-2026-01-01"]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["usage"]["prompt_tokens"] == sum(line["usage"]["prompt_tokens"] for line in lines_of(tmp_path))
    for name in ("report.html", "report.md", "report.json", "scores_for_card.json"):
        assert (tmp_path / "run" / name).is_file()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (one,) = (result for run in report["runs"] for result in run["benchmarks"].values())
    assert one["strict"] == scores["strict"] and one["published"] == scores["published"]
    assert run(tmp_path, server, **drawn)[0] == 0
    assert len(server.asked) == 6


def test_stages_alone(tmp_path, server):
    assert run(tmp_path, server, only="generate")[0] == 0
    assert not server.asked
    assert run(tmp_path, server, images=None, only="judge")[0] == 0
    assert len(server.asked) == 6 and not (tmp_path / "run" / "geneval++" / "scores.json").exists()
    status, said = run(tmp_path, None, images=None, only="score")
    assert status == 0 and "GenEval++:" in said and scores_of(tmp_path)["statuses"] == {"ok": 6}


def test_a_dry_run_counts_and_writes_nothing(tmp_path, server):
    status, said = run(tmp_path, server, images=None, dry_run=True, prices=Prices(2.0, 8.0))
    assert status == 0 and not server.asked and not (tmp_path / "run").exists()
    assert "6 items, 6 pictures, 0 of them there" in said and "6 calls with 6 images" in said and "cost: about" in said
    status, said = run(tmp_path, None, images=None, dry_run=True)
    assert "judge: gpt-4.1 (as published" in said and "OpenAI's rule for gpt-4.1" in said and "--price-in" in said
    run(tmp_path, server)
    assert "0 calls with 0 images" in run(tmp_path, server, images=None, dry_run=True)[1]


def test_a_limit_takes_the_first_of_each_tag_and_says_so(tmp_path, server):
    status, said = run(tmp_path, server, count=9, limit=2)
    assert status == 0 and "only the first 2 items of each tag: 6 items" in said
    items = (tmp_path / "run" / "geneval++" / "items.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in items] == ["1", "2", "3", "4", "5", "6"]
    run(tmp_path, server, count=9)
    assert len(server.asked) == 9 and scores_of(tmp_path)["num_items"] == 9


def test_options_of_a_benchmark_change_its_questions(tmp_path, server):
    run(tmp_path, server)
    run(tmp_path, server, options={"plurals": "published"})
    assert len(server.asked) == 6, "no plural of these prompts differs"
    with pytest.raises(ValueError, match="has no option 'plural'"):
        run(tmp_path, server, options={"plural": "published"})
    with pytest.raises(ValueError, match="must be a whole number"):
        run(tmp_path, server, benchmark="omnicontext", options={"repeats": "three"})


def test_missing_pictures_make_the_status_and_no_score(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", 6)
    write_images(tmp_path / "made", 4)
    status, said = run(tmp_path, server)
    assert status == 1 and "2 missing: 5.png, 6.png" in said and "2 lack a picture" in said
    assert scores_of(tmp_path)["statuses"] == {"ok": 4, "missing_image": 2}


def test_without_a_judge_the_pictures_are_made_and_that_is_said(tmp_path):
    with pytest.raises(RunFolderError, match="name a judge with --judge-model"):
        run(tmp_path, None)
    assert (tmp_path / "run" / "geneval++" / "images" / "1.png").is_file()


@pytest.mark.parametrize(
    "changed, words",
    [({"only": "draw"}, "choose one of generate, judge, score"), ({"limit": 0}, "--limit is 0"),
     ({"model": ModelOptions(TINY)}, "give one of them"), ({"only": "generate", "images": None}, "needs --model"),
     ({"only": "judge", "judge": None}, "name it with --judge-model")],
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path, changed, words):
    with pytest.raises((RunFolderError, JudgeError), match=words):
        Evaluation("geneval++", tmp_path, **{"images": tmp_path, **changed})


def test_a_key_that_is_missing_is_said_before_anything_is_drawn(tmp_path):
    wanted = evaluation(tmp_path, None, judge=JudgeOptions("gpt-4.1"))
    with pytest.raises(JudgeError, match="export OPENAI_API_KEY"):
        evaluate(wanted, lambda text: None)
    assert not (tmp_path / "run").exists()


def test_pictures_must_come_from_somewhere(tmp_path, server):
    with pytest.raises(RunFolderError, match="give --model to draw, or --images FOLDER"):
        run(tmp_path, server, images=None)


def test_a_benchmark_with_a_scorer_of_its_own(tmp_path):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    row = {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"}
    prompts.write_text(json.dumps(row) + "\n")
    shared = {"benchmark": "geneval", "prompts": prompts, "images": None, "options": {"num_images": "2"}}
    made = {"model": ModelOptions(TINY), "settings": SMALL}
    status, said = run(tmp_path, None, **shared, **made)
    images = tmp_path / "run" / "geneval" / "images"
    assert status == 0 and "judged by a program of its own" in said
    assert (images / "00000" / "metadata.jsonl").is_file() and (images / "00000" / "samples" / "00001.png").is_file()
    results = tmp_path / "results.jsonl"
    lines = [
        {"filename": f"x/00000/samples/{n:05d}.png", "tag": "single_object", "prompt": row["prompt"], "correct": not n,
         "reason": "", "metadata": "{}", "details": "{}"}
        for n in range(2)
    ]  # fmt: skip
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = run(tmp_path, None, **shared, only="score", results=results)
    assert status == 0 and "GenEval: 0.5 by the published formula" in said


def test_the_list_names_every_benchmark():
    listed = "\n".join(list_benchmarks())
    assert "geneval++" in listed and "280 items" in listed and "options size=fixed, repeats=1" in listed
