"""An evaluation that is killed at random moments gives the scores of one that was not, and asks nothing twice."""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from echo4o.evaluate.command import evaluate
from echo4o.evaluate.journal import read_judgements
from tests.evaluate.judge_server import Asked, JudgeServer
from tests.evaluate.processes import CONTEXT
from tests.evaluate.small_run import MODEL, evaluation, lines_of, scores_of

WORKERS = 3
NUM_ITEMS = 24
KILLS = 3


def run(folder: Path, url: str) -> None:
    """In a process of its own."""
    wanted = evaluation(folder, _At(url), NUM_ITEMS, judge={"workers": WORKERS})  # type: ignore[arg-type]
    raise SystemExit(evaluate(wanted, lambda text: None))


class _At:
    """A server of another process, as far as an evaluation needs it."""

    def __init__(self, url: str) -> None:
        self.url = url


def item_of(asked: Asked) -> str:
    """Item numbers count from 1, kites from 0."""
    return str(int(re.findall(r"kite number (\d+)", asked.text)[0]) + 1)


def recorded(folder: Path) -> set[str]:
    """Items with a judgement, after a kill: a torn line does not count."""
    return {item for item, _ in read_judgements(folder / "run" / "geneval++" / "judgements.jsonl")}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, monkeypatch, seed):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    choose = random.Random(seed)
    with JudgeServer(delay=0.02) as server:
        evaluate(evaluation(tmp_path / "calm", server, NUM_ITEMS), lambda text: None)
        server.asked.clear()
        server.counts.clear()
        server.weather = {"busy": 0.05, "error": 0.05, "truncate": 0.05}
        folder, kills, status = tmp_path / "killed", 0, None
        evaluation(folder, None, NUM_ITEMS)  # its prompts and pictures
        while status != 0:
            before, known = len(server.asked), recorded(folder)
            target = before + choose.randrange(0, 8)
            process = CONTEXT.Process(target=run, args=(folder, server.url))
            process.start()
            while process.is_alive() and len(server.asked) <= target:
                time.sleep(0.002)
            time.sleep(choose.uniform(0, 0.05))
            if kills < KILLS and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join(60)
            status = process.exitcode
            time.sleep(0.05)  # of the killed process' requests the last ones arrive
            again = {item_of(asked) for asked in server.asked[before:]} & known
            assert not again, f"asked again, though judged: {again}"
    assert kills == KILLS
    assert scores_of(folder) == scores_of(tmp_path / "calm")
    lines = Counter(line["item"] for line in lines_of(folder))
    assert set(lines.values()) == {1} and len(lines) == NUM_ITEMS
    larger = sum(asked.max_tokens > 512 for asked in server.asked)  # the second calls of cut replies
    assert sum(server.counts.values()) - larger <= NUM_ITEMS + kills * WORKERS
    assert {line["judge"] for line in lines_of(folder)} == {MODEL}


def test_ctrl_c_waits_for_replies_on_their_way(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    evaluation(tmp_path, None, NUM_ITEMS)
    with JudgeServer(delay=0.3) as server:
        process = CONTEXT.Process(target=run, args=(tmp_path, server.url))
        process.start()
        while process.is_alive() and len(server.asked) < WORKERS + 1:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 130
        assert sum(server.counts.values()) == len(lines_of(tmp_path)) == len(server.asked) < NUM_ITEMS
