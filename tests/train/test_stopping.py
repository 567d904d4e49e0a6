"""Stop signals: a clean stop in bounded time, a marker, and no mistaking of torchrun's clean-up for pre-emption."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from echo4o.train.stopping import STOP_FILE, StopRequest, remove_stop_marker, write_stop_marker
from tests.train.ranks import Ranks, wait_for


def test_a_signal_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_time_limit_starts_with_the_signal():
    messages, threads = [], threading.active_count()
    with StopRequest(grace=0.2, give_up=messages.append):
        time.sleep(0.4)
        assert messages == []
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.6)
    (message,) = messages
    assert message.startswith("SIGUSR1 was received 0 s ago") and "--stop_grace" in message
    assert threading.active_count() == threads


def test_a_run_that_ends_in_time_hears_nothing_of_the_limit():
    messages, threads = [], threading.active_count()
    with StopRequest(grace=0.3, give_up=messages.append):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert messages == [] and threading.active_count() == threads


def test_marker(tmp_path):
    write_stop_marker(tmp_path, "SIGUSR1", 7, tmp_path / "checkpoints" / "0000007")
    marker = json.loads((tmp_path / STOP_FILE).read_text())
    assert (marker["reason"], marker["step"]) == ("SIGUSR1", 7) and marker["checkpoint"].endswith("0000007")
    remove_stop_marker(tmp_path)
    remove_stop_marker(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_signal_to_one_rank_stops_both_cleanly(tmp_path):
    with Ranks(tmp_path, steps=100_000) as ranks:
        wait_for(tmp_path / "step")
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert [ranks.status(0), ranks.status(1)] == [0, 0]
    assert ranks.output() == ""
    assert json.loads((tmp_path / STOP_FILE).read_text())["step"] > 0


def test_a_stop_that_takes_too_long_gives_up(tmp_path):
    with Ranks(tmp_path, 1, steps=100_000, save_seconds=600, stop_grace=1) as ranks:
        wait_for(tmp_path / "step")
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.status(0) == 1
    assert ranks.output().count("SIGTERM was received 1 s ago") == 1 and "untouched" in ranks.output()
    assert "watched_run.py" in ranks.log(0), "stacks"
    assert not (tmp_path / STOP_FILE).exists()


@pytest.mark.slow
def test_the_limit_holds_for_a_main_thread_in_native_code(tmp_path):
    """Where Python's own handler does not run: in a collective operation that waits for another rank."""
    with Ranks(tmp_path, actions={"1@2": "wait"}, stop_grace=1) as ranks:
        wait_for(tmp_path / "ready_1")
        for process in ranks.processes:
            process.send_signal(signal.SIGTERM)
        assert [ranks.status(0), ranks.status(1)] == [1, 1]
    assert ranks.output().count("SIGTERM was received 1 s ago") == 1


@pytest.mark.slow
def test_a_signal_that_follows_another_ranks_death_is_no_pre_emption(tmp_path):
    """torchrun ends the survivors with SIGTERM: they leave at once, and save nothing."""
    with Ranks(tmp_path, actions={"1@2": "wait"}, stop_grace=60) as ranks:
        killed = ranks.signal(1, signal.SIGKILL)
        time.sleep(0.2)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.status(0) == 1
        assert time.monotonic() - killed < 20
    assert ranks.output().count("rank 1 on host") == 1
    assert not (tmp_path / STOP_FILE).exists()
