"""One message for whatever ends a run."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from echo4o.config import ConfigError
from echo4o.train.failures import Failure, describe, exit_status, first_line, is_peer_error, reporting_failures
from echo4o.train.processes import Processes
from tests.train.ranks import Ranks

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:9646. This is "
    "typically caused by a remote worker crashing."
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 2000 ms"),
        RuntimeError("Timed out waiting 60000ms for recv operation to complete"),
        RuntimeError("NCCL communicator was aborted on rank 3."),
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error"
        ),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
    ],
)
def test_errors_that_another_rank_caused(error):
    assert is_peer_error(error)
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("cannot save") from cause
    except ValueError as wrapped:
        assert is_peer_error(wrapped)


@pytest.mark.parametrize(
    "error", [ValueError("connection closed by peer"), RuntimeError("shape mismatch"), OSError(28)]
)
def test_errors_of_our_own(error):
    assert not is_peer_error(error)


def test_what_was_handled_before_is_not_the_cause():
    try:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError:
            raise ValueError("something else") from None
    except ValueError as error:
        assert not is_peer_error(error)


def test_messages():
    assert describe(ConfigError("lr is -1\n  Raise it."), "rank 0 on host a") == (
        "ConfigError: lr is -1\n  Raise it.\n  (rank 0 on host a)"
    )
    assert describe(KeyError("x"), "rank 0 on host a").endswith("rank 0 on host a failed: KeyError: 'x'")
    assert first_line(RuntimeError("\n\nfirst\nsecond")) == "first" and first_line(ValueError()) == "ValueError"
    assert Failure.from_json(Failure(3, "a\nb").to_json()) == Failure(3, "a\nb")
    assert [exit_status(error) for error in (KeyboardInterrupt(), ConfigError(""), ValueError())] == [130, 2, 1]


def test_alone_errors_pass_unchanged():
    with pytest.raises(ConfigError), reporting_failures(Processes()):
        raise ConfigError("lr")


def test_before_the_ranks_meet_one_of_each_host_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for local_rank in (1, 0):
        processes = Processes(rank=4 + local_rank, world_size=8, local_rank=local_rank, local_world_size=4, host="b")
        with pytest.raises(SystemExit) as stopped, reporting_failures(processes):
            raise ConfigError("lr")
        assert stopped.value.code == 2
    assert capsys.readouterr().err == "ConfigError: lr\n  (rank 5 on host b)\n"


def test_an_error_that_every_rank_raises_is_printed_once(tmp_path):
    with Ranks(tmp_path, actions={"0@2": "config_error", "1@2": "config_error"}) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [2, 2]
    assert ranks.output().count("ConfigError: lr is -1") == 1 and "Traceback" not in ranks.output()


@pytest.mark.slow
def test_a_users_error_of_one_rank_keeps_its_remedy(tmp_path):
    with Ranks(tmp_path, actions={"1@2": "data_error"}) as ranks:
        assert [ranks.status(0), ranks.status(1)] == [1, 1]
    assert ranks.output(0) == ""
    assert ranks.output(1).startswith("\nDataError: row 7 is unusable.\n  Remove it.\n  (rank 1 on host ")
