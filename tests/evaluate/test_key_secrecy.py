"""The key of a judge is in no file, log, message or traceback, whatever goes wrong and however loud the logs are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from echo4o.evaluate.client import CallFailed, JudgeClient, JudgeError, JudgeOptions
from tests.evaluate.judge_server import Fault, JudgeServer
from tests.evaluate.small_run import evaluation

KEY = "sk-proj-" + "Se3cret" * 6
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
for name in ("httpx", "httpx2", "httpcore", "httpcore2"):
    logging.getLogger(name).setLevel(logging.DEBUG)
from pathlib import Path
from tests.evaluate.small_run import evaluation
from echo4o.evaluate.command import evaluate
class Server:
    url = sys.argv[2]
evaluate(evaluation(Path(sys.argv[1]), Server, judge={"max_attempts": 2, "key_env": "JUDGE_KEY"}))
"""


def everything_of(folder: Path, result: subprocess.CompletedProcess[bytes]) -> bytes:
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return b"\n".join([result.stdout, result.stderr, *written])


def test_all_logs_and_files_of_runs_that_go_well_and_wrong(tmp_path):
    evaluation(tmp_path, None)
    environment = {**os.environ, "JUDGE_KEY": KEY, "OPENAI_LOG": "debug", "ECHO4O_TRACEBACK": "1"}
    with JudgeServer(echo_authorization=True) as server:
        server.faults = [
            Fault("error", times=2, containing="kite number 0."),
            Fault("busy", containing="kite number 1.", seconds=0.01),
            Fault("bad_request", times=2, containing="kite number 2."),
            Fault("unauthorized", times=1, containing="kite number 5."),
        ]
        server.answer = lambda text: {"correct": 1, "reason": f"I was told {KEY}"}
        run = [sys.executable, "-c", PROGRAM, str(tmp_path), server.url]
        result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    everything = everything_of(tmp_path, result)
    assert server.authorization["present"] > 6 and result.returncode == 1
    assert b"Traceback" in result.stderr and b"JudgeError" in result.stderr and b"(key)" in everything
    assert b"openai._base_client" in result.stderr, "openai's debug log is not on"
    assert KEY.encode() not in everything
    assert KEY[8:].encode() not in everything


@pytest.mark.parametrize("kind", ["error", "unauthorized", "bad_request", "quota"])
def test_no_exception_says_it(monkeypatch, kind):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(faults=[Fault(kind, times=None)], echo_authorization=True) as server:
        client = JudgeClient(JudgeOptions("judge-1", server.url, max_attempts=1, timeout=5))
        with pytest.raises((JudgeError, CallFailed)) as caught:
            client.ask([{"role": "user", "content": "?"}], {}, 10)
    assert KEY not in str(caught.value) and KEY not in repr(caught.value)
    assert KEY not in repr(client.options) and KEY not in repr(vars(client)["_secret"])
    assert caught.value.__suppress_context__, "the library's own error would be shown with it"


def test_keys_that_a_server_shows_in_part_are_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    message = "Incorrect API key provided: sk-proj-****cret."
    fault = Fault("unauthorized", message=message)
    with JudgeServer(faults=[fault]) as server, pytest.raises(JudgeError) as caught:
        JudgeClient(JudgeOptions("judge-1", server.url)).ask([{"role": "user", "content": "?"}], {}, 10)
    assert "cret" not in str(caught.value) and "(key)" in str(caught.value)
