"""The key of a judge is in no file, log, message or traceback, whatever goes wrong and however loud the logs are."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from echo4o.evaluate.client import CallFailed, JudgeClient, JudgeError, JudgeOptions
from echo4o.evaluate.command import evaluate
from tests.evaluate.judge_server import Fault, JudgeServer
from tests.evaluate.processes import CONTEXT
from tests.evaluate.small_run import evaluation

KEY = "sk-proj-" + "Se3cret" * 6


def run_loudly(folder: Path, url: str, key: str, log: Path) -> None:
    """In a process of its own: everything that it says, at the loudest, goes into `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= {"JUDGE_KEY": key, "ECHO4O_TRACEBACK": "1"}
    logging.basicConfig(level=logging.DEBUG, force=True, stream=os.fdopen(2, "w", buffering=1))
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    server = SimpleNamespace(url=url)
    judge = {"max_attempts": 2, "key_env": "JUDGE_KEY", "workers": 1}
    evaluate(evaluation(folder, server, judge=judge))  # type: ignore[arg-type]


def test_all_logs_and_files_of_runs_that_go_well_and_wrong(tmp_path):
    folder, log = tmp_path / "evaluated", tmp_path / "log"
    evaluation(folder, None)
    with JudgeServer(echo_authorization=True) as server:
        server.faults = [
            Fault("error", times=2, containing="kite number 0."),
            Fault("busy", containing="kite number 1.", seconds=0.01),
            Fault("bad_request", times=2, containing="kite number 2."),
            Fault("unauthorized", times=1, containing="kite number 5."),
        ]
        server.answer = lambda text: {"correct": 1, "reason": f"I was told {KEY}"}
        process = CONTEXT.Process(target=run_loudly, args=(folder, server.url, KEY, log))
        process.start()
        process.join(60)
    said = log.read_bytes()
    everything = b"\n".join([said, *(path.read_bytes() for path in folder.rglob("*") if path.is_file())])
    assert process.exitcode == 1 and server.authorization == {"present": 9}
    for expected in (b"Traceback", b"JudgeError", b"openai._base_client", b"httpcore"):
        assert expected in said, "the logs are not as loud as they can be"
    assert b"I was told (key)" in everything
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
