"""The judge's client against a server that does everything wrong that servers do."""

import threading
import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from echo4o.evaluate.client import CallFailed, JudgeClient, JudgeError, JudgeOptions, retry_after
from echo4o.evaluate.pacing import Pace, Stopped, backoff
from tests.evaluate.judge_server import Fault, JudgeServer

SCHEMA = {"type": "object", "properties": {"correct": {"type": "integer", "enum": [0, 1]}}, "required": ["correct"]}
MESSAGES = [{"role": "user", "content": "Is it a kite?"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def client(server: JudgeServer, **changed) -> JudgeClient:
    return JudgeClient(JudgeOptions("judge-1", server.url, **{"backoff": 0.01, "timeout": 10.0, **changed}))


def ask(one: JudgeClient, max_tokens: int = 100):
    return one.ask(MESSAGES, SCHEMA, max_tokens)


def test_an_answer():
    with JudgeServer() as server:
        one = client(server)
        reply = ask(one)
    assert reply.text.startswith('{"correct": ') and not reply.truncated and reply.attempts == 1
    assert reply.usage["prompt_tokens"] > 0 and one.served_by == {"judge-1"}
    (asked,) = server.asked
    assert (asked.temperature, asked.max_tokens, asked.has_schema, asked.model) == (0.0, 100, True, "judge-1")
    assert server.authorization == {"absent": 1}


@pytest.mark.parametrize("kind", ["busy", "error", "drop", "reset", "no_json", "empty"])
def test_what_passes_is_tried_again(kind):
    with JudgeServer(faults=[Fault(kind, times=2)]) as server:
        reply = ask(client(server))
    assert reply.attempts == 3 and len(server.asked) == 3


@pytest.mark.parametrize("kind", ["error", "drop"])
def test_what_does_not_pass_fails_with_the_reason(kind):
    with JudgeServer(faults=[Fault(kind, times=None)]) as server, pytest.raises(CallFailed) as failed:
        ask(client(server, max_attempts=3))
    assert failed.value.attempts == 3 == len(server.asked)
    assert ("500" in str(failed.value)) == (kind == "error")


def test_a_server_that_does_not_answer_in_time():
    with JudgeServer(faults=[Fault("delay", seconds=1.0)]) as server:
        reply = ask(client(server, timeout=0.3))
    assert reply.attempts == 2


def test_a_server_that_is_not_there():
    with JudgeServer() as server:
        one = client(server, max_attempts=2)
    with pytest.raises(CallFailed, match="APIConnectionError"):
        ask(one)


def test_retry_after_is_kept_by_all_workers():
    with JudgeServer(faults=[Fault("busy", seconds=0.6)]) as server:
        one = client(server)
        threads = [threading.Thread(target=ask, args=(one,)) for _ in range(3)]
        threads[0].start()
        time.sleep(0.2)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    begun = server.asked[0].at
    assert all(asked.at - begun >= 0.55 for asked in server.asked[1:]) and len(server.asked) == 4


def test_a_pause_of_hours_is_the_users():
    with JudgeServer(faults=[Fault("busy", seconds=7200)]) as server, pytest.raises(JudgeError) as error:
        ask(client(server))
    assert "pause of 120 minutes" in str(error.value)


@pytest.mark.parametrize(
    "headers, expected",
    [({"retry-after": "3"}, 3.0), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "x"}, None),
     ({}, None), ({"retry-after": formatdate(time.time() - 60, usegmt=True)}, 0.0)],
)  # fmt: skip
def test_ways_to_say_retry_after(headers, expected):
    error = ValueError()
    error.response = SimpleNamespace(headers=headers)  # type: ignore[attr-defined]
    assert retry_after(error) == expected


@pytest.mark.parametrize(
    "kind, words", [("unauthorized", "set OPENAI_API_KEY"), ("unknown_model", "knows no model 'judge-1'"),
                    ("quota", "account is empty")],
)  # fmt: skip
def test_what_no_question_survives_stops_at_once(kind, words):
    with JudgeServer(faults=[Fault(kind, times=None)]) as server, pytest.raises(JudgeError, match=words):
        ask(client(server))
    assert len(server.asked) == 1


def test_a_wrong_path_is_told_from_a_busy_server():
    with JudgeServer() as server:
        one = JudgeClient(JudgeOptions("judge-1", server.url.removesuffix("/v1") + "/v2"))
        with pytest.raises(JudgeError, match="ends in /v1"):
            ask(one)


def test_a_server_without_schemas_is_asked_in_words_and_remembered():
    with JudgeServer(supports_schema=False) as server:
        one = client(server)
        assert ask(one).attempts == 2
        assert ask(one).attempts == 1
    assert [asked.has_schema for asked in server.asked] == [True, False, False]
    assert any("no schema" in note for note in one.dialect.notes)


def test_a_question_that_is_refused_does_not_cost_the_schema():
    with JudgeServer() as server:
        one = client(server)
        ask(one)
        server.faults.append(Fault("bad_request", times=2, message="the picture cannot be read"))
        with pytest.raises(CallFailed, match="cannot be read"):
            ask(one)
        ask(one)
    assert server.asked[-1].has_schema and not one.dialect.notes


def test_a_refused_question_on_a_new_server_does_not_cost_the_schema():
    with JudgeServer(faults=[Fault("bad_request", times=2)]) as server:
        one = client(server)
        with pytest.raises(CallFailed):
            ask(one)
        ask(one)
    assert server.asked[-1].has_schema


def test_a_model_with_the_new_names_and_no_temperature():
    with JudgeServer(only_new_names=True) as server:
        one = client(server)
        assert ask(one).attempts == 3
        assert ask(one).attempts == 1
    assert server.asked[-1].temperature is None and server.asked[-1].max_tokens == 100 and server.asked[-1].has_schema
    assert any("temperature" in note for note in one.dialect.notes)


def test_a_cut_reply_and_a_refusal_are_told():
    with JudgeServer(faults=[Fault("truncate"), Fault("refuse")]) as server:
        one = client(server)
        assert ask(one).truncated
        assert ask(one).refusal == "I cannot judge this."


def test_a_key_goes_along_and_another_variable_may_hold_it(monkeypatch):
    monkeypatch.setenv("MY_KEY", "  sk-test-0123456789\n")
    with JudgeServer() as server:
        ask(client(server, key_env="MY_KEY"))
    assert server.authorization == {"present": 1}


def test_openai_needs_a_key_and_a_named_variable_must_hold_one(monkeypatch):
    with pytest.raises(JudgeError, match="export OPENAI_API_KEY"):
        JudgeClient(JudgeOptions("judge-1"))
    with pytest.raises(JudgeError, match="export MY_KEY"):
        JudgeClient(JudgeOptions("judge-1", "http://localhost:1/v1", key_env="MY_KEY"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with a blank")
    with pytest.raises(JudgeError) as error:
        JudgeClient(JudgeOptions("judge-1"))
    assert "blank" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "https://user:pass-word@host/v1", "https://host/v1?key=pass-word", "", "ftp://host"]
)
def test_addresses_that_are_none_or_hold_a_secret(url):
    with pytest.raises(JudgeError) as error:
        JudgeOptions("judge-1", url)
    assert "pass-word" not in str(error.value)


@pytest.mark.parametrize("changed", [{"workers": 0}, {"timeout": 0}, {"requests_per_minute": -1}, {"max_attempts": 0}])
def test_numbers_that_cannot_be(changed):
    with pytest.raises(JudgeError, match=next(iter(changed))):
        JudgeOptions("judge-1", **changed)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'echo4o\[eval\]'"):
        JudgeClient(JudgeOptions("judge-1", "http://localhost:1/v1"))


# ---------------------------------------------------------------- pace


def test_requests_and_tokens_a_minute():
    pace, begun = Pace(requests_per_minute=1200), time.monotonic()
    for _ in range(5):
        pace.wait()
    assert 0.19 <= time.monotonic() - begun < 0.6
    pace, begun = Pace(tokens_per_minute=60_000), time.monotonic()
    for _ in range(4):
        pace.wait(100)
    assert 0.29 <= time.monotonic() - begun < 0.7


def test_the_limit_holds_for_all_threads_together():
    with JudgeServer() as server:
        one = client(server, requests_per_minute=1200)
        threads = [threading.Thread(target=ask, args=(one,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    times = sorted(asked.at for asked in server.asked)
    assert times[-1] - times[0] >= 0.2


def test_a_stop_ends_every_wait():
    stop = threading.Event()
    pace = Pace(stop=stop)
    pace.hold(60)
    threading.Timer(0.1, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        pace.wait()
    assert time.monotonic() - begun < 5


def test_pauses_grow_up_to_a_minute():
    assert all(base / 2 <= backoff(attempt, 1.0) <= base for attempt, base in [(1, 1), (2, 2), (5, 16), (12, 60)])
