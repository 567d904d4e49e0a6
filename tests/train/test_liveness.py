"""A rank that dies or hangs takes the others down soon, with one message. With real processes on gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import pytest

from echo4o.train.signs import Beat, Identity, Unchanged, furthest_behind, stragglers
from tests.train.ranks import ROOT, Ranks, environment, wait_for, write_settings


@pytest.mark.slow
def test_ranks_that_finish_leave_together(tmp_path):
    with Ranks(tmp_path, actions={"1@3": "late"}) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [0, 0]
    assert sorted(ranks.output().splitlines()) == ["rank 0 done at 3", "rank 1 done at 3"]
    for rank in (0, 1):
        beat = json.loads((tmp_path / "heartbeats" / f"rank_{rank:05d}.json").read_text())
        assert beat["rank"] == rank and beat["pid"] == ranks.processes[rank].pid
        assert time.time() - beat["time"] < 60


def test_a_rank_that_raises_is_named_once_with_its_cause(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "raise"}) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [1, 1]
    assert ranks.output(0) == ""
    assert ranks.output(1).count("ValueError: the picture is upside down") == 2, "in the traceback and in the message"
    assert re.search(r"^rank 1 on host \S+ failed: ValueError: the picture is upside down$", ranks.output(1), re.M)
    assert "Traceback" in ranks.log(0), "the details are kept"


def test_a_killed_rank_is_named_by_the_one_that_waits_for_it(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "wait"}) as ranks:
        killed = ranks.signal(1, SIGKILL)
        assert ranks.status(0) == 1
        assert time.monotonic() - killed < 15
    assert ranks.output(0).count("is gone") == 1 and "Traceback" not in ranks.output(0)
    assert re.search(r"^rank 1 on host \S+ \(pid \d+\) is gone, last seen in 'data' of step 2", ranks.output(0), re.M)
    assert "rank_00001.log" in ranks.output(0) and "--auto_resume True" in ranks.output(0)


def test_rank_0_may_die_and_the_store_with_it(tmp_path):
    with Ranks(tmp_path, actions={"0@2": "wait"}) as ranks:
        ranks.signal(0, SIGKILL)
        assert ranks.status(1) == 1
    assert ranks.output(1).count("rank 0") == 1 and "is gone" in ranks.output(1)


def test_a_suspended_rank_is_dead_after_a_while(tmp_path):
    """NCCL's way to lose a rank: no error comes out of the collective operation, ever."""
    with Ranks(tmp_path, actions={"1@2": "wait"}, dead_rank_timeout=3) as ranks:
        ranks.signal(1, SIGSTOP)
        assert ranks.status(0) == 1
    assert ranks.output(0).count("gave no sign of life for 3 s") == 1
    assert "rank 1" in ranks.output(0) and "suspended" in ranks.output(0)
    assert "watched_run.py" in ranks.log(0), "where the survivor stood"


@pytest.mark.slow
def test_a_rank_on_another_host_is_found_by_its_silence(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "wait"}, apart=True) as ranks:
        ranks.signal(1, SIGKILL)
        assert ranks.status(0) == 1
    assert ranks.output(0).count("rank 1 on host host1") == 1 and "gave no sign of life" in ranks.output(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGKILL, SIGSTOP])
def test_the_machine_that_holds_the_store_may_go(tmp_path, number):
    with Ranks(tmp_path, 3, actions={"0@2": "wait"}, apart=True, dead_rank_timeout=3) as ranks:
        ranks.signal(0, number)
        assert [ranks.status(1), ranks.status(2)] == [1, 1]
    assert ranks.output().count("lost the rendezvous at 127.0.0.1") == 1, "once on this host"


def test_a_hang_leaves_stacks_and_a_message(tmp_path):
    with Ranks(tmp_path, 1, actions={"0@2": "hang"}, hang_timeout=2) as ranks:
        assert ranks.status(0) == 1
    assert ranks.output().count("no progress for 2 s in 'data' of step 2") == 1
    assert "rank_00000.log" in ranks.output() and "--hang_timeout" in ranks.output()
    assert "in sleep_in_python" in ranks.log(0)


@pytest.mark.slow
def test_of_several_ranks_the_one_that_hangs_is_named(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "hang"}, hang_timeout=2) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [1, 1]
    assert ranks.output().count("no progress for 2 s") == 1
    assert re.search(r"^rank 1 on host \S+ \(pid \d+\): no progress", ranks.output(), re.M)
    assert "in sleep_in_python" in ranks.log(1) and "all_reduce" in ranks.log(0)


@pytest.mark.slow
def test_a_hang_that_holds_pythons_lock_ends_too(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "hang_natively"}, hang_timeout=2, dead_rank_timeout=3) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [1, 1]
    assert "sleep_in_native_code" in ranks.log(1)
    assert "rank 1" in ranks.output()


def test_torchrun_restarts_a_failed_group(tmp_path):
    """The failure of the first start must not end the second."""
    settings = write_settings(tmp_path, steps=4, resume=True, actions={"1@3": "raise"})
    command = (
        "-m torch.distributed.run --nproc_per_node 2 --max_restarts 1 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0"
    )
    done = subprocess.run(
        [sys.executable, *command.split(), "-m", "tests.train.watched_run", str(settings)],
        cwd=ROOT,
        env=environment(tmp_path),
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 done at 4", "rank 1 done at 4"]
    assert done.stderr.count("failed: ValueError: the picture is upside down") == 1


# ---------------------------------------------------------------- parts


def test_a_process_exists_until_it_ends_even_unreaped():
    process = subprocess.Popen(["sleep", "60"])
    try:
        here = Identity.of_this_process(0, "a")
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        other = Identity(1, "a", process.pid, started, here.place)
        assert here.exists() and other.exists() and other.is_neighbour_of(here)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not other.exists(), "dead, though its number is still taken"
    finally:
        process.kill()
        process.wait()
    assert not Identity(1, "a", os.getpid(), "1", here.place).exists(), "another process with the same number"


def test_hosts_that_do_not_tell_their_place_are_no_neighbours():
    assert not Identity(0, "a", 1, "", "").is_neighbour_of(Identity(1, "a", 2, "", ""))


def test_unchanged_does_not_count_the_time_of_a_suspension(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("echo4o.train.signs.time.monotonic", lambda: now[0])
    unchanged = Unchanged(longest_look=2)
    assert unchanged.seconds(1) == 0
    now[0] = 1
    assert unchanged.seconds(1) == 1
    now[0] = 1000
    assert unchanged.seconds(1) == 3
    assert unchanged.seconds(2) == 0


def test_furthest_behind():
    beats = {rank: Beat(9, 3, "forward", progress) for rank, progress in enumerate((7, 6, 7))}
    assert furthest_behind(beats) == [1]
    assert furthest_behind({0: beats[0], 2: beats[2]}) == []


def test_stragglers_are_named():
    hosts = ["a", "a", "b", "b"]
    assert stragglers([10, 10, 10, 14], hosts) == []
    (line,) = stragglers([10, 10, 16, 10], hosts)
    assert line.startswith("rank 2 on host b takes 1.6 ×")
    assert len(stragglers([10, 16], hosts[:2])) == 1
    assert stragglers([10, 10, 90], hosts[:3]) == [] and stragglers([5], ["a"]) == []
    assert stragglers([0, 0, 0, 0], hosts) == []


@pytest.mark.slow
def test_heartbeats_that_cannot_be_written_do_not_end_a_run(tmp_path):
    (tmp_path / "heartbeats").write_text("not a folder")
    with Ranks(tmp_path, 1) as ranks:
        assert ranks.status(0) == 0
    wait_for(tmp_path / "logs" / "rank_00000.log")
    assert ranks.log(0).count("no heartbeat file") == 1
