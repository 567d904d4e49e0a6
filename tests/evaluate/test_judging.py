"""Judging as a whole: nothing twice, nothing guessed, and after every kind of trouble the same scores."""

import json

import pytest
from PIL import Image

from echo4o.evaluate import judging
from echo4o.evaluate.client import JudgeError
from echo4o.evaluate.command import evaluate
from tests.evaluate.judge_server import Fault, JudgeServer
from tests.evaluate.small_run import evaluation, lines_of, scores_of, write_images


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def run(folder, server, **changed) -> list[str]:
    """What it says; the last entry is the exit status."""
    said: list[str] = []
    status = evaluate(evaluation(folder, server, **changed), said.append)
    return [*said, str(status)]


def test_a_run_and_a_second_one_that_has_nothing_to_do(tmp_path, server):
    assert run(tmp_path, server)[-1] == "0"
    lines, scores = lines_of(tmp_path), scores_of(tmp_path)
    assert len(lines) == len(server.asked) == 6 and {line["status"] for line in lines} == {"ok"}
    assert scores["strict"] == pytest.approx(sum(line["answer"]["correct"] for line in lines) / 6)
    assert run(tmp_path, server)[-1] == "0"
    assert len(server.asked) == 6 and lines_of(tmp_path) == lines and scores_of(tmp_path) == scores


def test_trouble_changes_no_score(tmp_path, server):
    run(tmp_path / "calm", server)
    server.weather = {"busy": 0.15, "error": 0.15, "drop": 0.1, "reset": 0.05, "no_json": 0.1, "markdown": 0.2}
    run(tmp_path / "storm", server, judge={"max_attempts": 20})
    assert scores_of(tmp_path / "storm") == scores_of(tmp_path / "calm")
    assert max(line["attempts"] for line in lines_of(tmp_path / "storm")) > 1


def test_failed_calls_are_made_again_and_only_they(tmp_path, server):
    server.faults = [Fault("error", times=None, containing="kite number 2.")]
    said = run(tmp_path, server, judge={"max_attempts": 2})
    assert said[-1] == "1" and scores_of(tmp_path)["statuses"] == {"ok": 5, "api_error": 1}
    (failed,) = [line for line in lines_of(tmp_path) if line["status"] == "api_error"]
    assert failed["answer"] is None and failed["attempts"] == 2 and "500" in failed["error"]
    server.faults.clear()
    before = len(server.asked)
    assert run(tmp_path, server)[-1] == "0"
    assert len(server.asked) == before + 1 and scores_of(tmp_path)["statuses"] == {"ok": 6}


def test_a_reply_without_an_answer_is_asked_for_again_only_on_demand(tmp_path, server):
    server.faults = [Fault("garbage", containing="kite number 1."), Fault("refuse", containing="kite number 3.")]
    assert run(tmp_path, server)[-1] == "1"
    failed = {line["item"]: line for line in lines_of(tmp_path) if line["status"] == "parse_error"}
    assert "weather" in failed["2"]["text"] and failed["4"]["error"].startswith("refused")
    assert all(line["answer"] is None for line in failed.values())
    run(tmp_path, server)
    assert len(server.asked) == 6
    assert run(tmp_path, server, retry_failed=True)[-1] == "0"
    assert len(server.asked) == 8


def test_a_cut_reply_is_asked_for_once_with_a_larger_cap(tmp_path, server):
    once = Fault("truncate", times=1, containing="kite number 1.")
    always = Fault("truncate", times=None, containing="kite number 4.")
    server.faults = [once, always]
    run(tmp_path, server)
    lines = {line["item"]: line for line in lines_of(tmp_path)}
    assert lines["2"]["status"] == "ok" and lines["2"]["attempts"] == 2
    assert lines["5"]["status"] == "parse_error" and lines["5"]["error"] == "cut off at 2048 tokens"
    caps = [asked.max_tokens for asked in server.asked if "kite number 4." in asked.text]
    assert caps == [512, 2048] and len(server.asked) == 8
    (first, second) = (asked for asked in server.asked if "kite number 1." in asked.text)
    assert first.digest == second.digest and lines["2"]["usage"]["prompt_tokens"] > lines["1"]["usage"]["prompt_tokens"]


def test_only_what_has_changed_is_judged_again(tmp_path, server):
    run(tmp_path, server)
    Image.new("RGB", (32, 24), "white").save(tmp_path / "made" / "3.png")
    prompts = (tmp_path / "prompts.jsonl").read_text().replace("kite number 4", "kite number four")
    (tmp_path / "prompts.jsonl").write_text(prompts)
    run(tmp_path, server)
    assert [line["item"] for line in lines_of(tmp_path)[6:]] in (["3", "5"], ["5", "3"])
    run(tmp_path, server, judge={"model": "other-judge"})
    assert len(lines_of(tmp_path)) == 14 and scores_of(tmp_path)["judge"] == "other-judge"
    # The first judge's verdicts still hold: they become the latest lines without a call.
    asked = len(server.asked)
    run(tmp_path, server)
    assert len(server.asked) == asked and len(lines_of(tmp_path)) == 20
    latest = {line["item"]: line["judge"] for line in lines_of(tmp_path)}
    assert set(latest.values()) == {"test-judge-2026-01-01"}
    usage = json.loads((tmp_path / "run" / "geneval++" / "scores.json").read_text())["usage"]
    tokens = sum(line["usage"]["prompt_tokens"] for line in lines_of(tmp_path)[:14])
    assert usage["prompt_tokens"] == tokens, "what counts again was paid for once"


def test_missing_and_broken_pictures_are_not_sent(tmp_path, server):
    write_images(tmp_path / "made", 6)
    (tmp_path / "made" / "2.png").unlink()
    (tmp_path / "made" / "5.png").write_bytes(b"no picture")
    said = run(tmp_path, server)
    assert said[-1] == "1" and len(server.asked) == 4
    lines = {line["item"]: line for line in lines_of(tmp_path)}
    assert {lines[item]["status"] for item in ("2", "5")} == {"missing_image"}
    assert scores_of(tmp_path)["statuses"] == {"ok": 4, "missing_image": 2}
    run(tmp_path, server)
    assert len(server.asked) == 4 and len(lines_of(tmp_path)) == 6
    for name in ("2", "5"):
        Image.new("RGB", (32, 24), "red").save(tmp_path / "made" / f"{name}.png")
    assert run(tmp_path, server)[-1] == "0"
    assert len(server.asked) == 6 and scores_of(tmp_path)["statuses"] == {"ok": 6}


def test_a_fatal_error_ends_the_run_with_one_message(tmp_path, server):
    server.faults = [Fault("quota", times=None, containing="kite number 3.")]
    with pytest.raises(JudgeError, match="account is empty"):
        run(tmp_path, server, judge={"workers": 1})
    assert [line["item"] for line in lines_of(tmp_path)] == ["1", "2", "3"]
    server.faults.clear()
    assert run(tmp_path, server)[-1] == "0"
    assert len(lines_of(tmp_path)) == 6 and server.times_asked("kite number 1.") == 1


def test_a_judge_that_fails_one_question_after_the_other_is_left_alone(tmp_path, server, monkeypatch):
    monkeypatch.setattr(judging, "MAX_FAILURES_IN_A_ROW", 3)
    server.faults = [Fault("error", times=None)]
    with pytest.raises(JudgeError, match="3 questions in a row got no reply, the last: InternalServerError 500"):
        run(tmp_path, server, count=40, judge={"max_attempts": 1, "workers": 2})
    assert len(server.asked) < 10


def test_workers_share_the_questions(tmp_path, server):
    server.delay = 0.1
    run(tmp_path, server, count=16, judge={"workers": 4})
    assert server.most_at_once == 4


def test_scores_count_no_judgement_of_another_picture(tmp_path, server):
    """Scored alone, after a picture has changed and before it is judged again."""
    run(tmp_path, server)
    Image.new("RGB", (32, 24), "white").save(tmp_path / "made" / "3.png")
    assert run(tmp_path, None, images=None, only="score")[-1] == "1"
    assert scores_of(tmp_path)["statuses"] == {"ok": 5, "not_judged": 1}
    assert json.loads((tmp_path / "run" / "geneval++" / "run.json").read_text())["judge"] == "test-judge-2026-01-01"
