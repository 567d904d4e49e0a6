"""A killed run goes on exactly as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o.checkpoint import folders
from echo4o.config import load_config
from echo4o.train.metrics import read_metrics
from echo4o.train.trainer import train
from tests.train.tiny_run import run_settings, write_bagel

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("loss", "mse", "ce", "lr", "grad_norm", "num_mse_tokens", "skipped_steps")


def start(settings: dict, folder: Path, name: str, timeout: float = 240) -> subprocess.CompletedProcess:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "tests.train.kill_run", str(path)],
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def one_thread():
    """As the killed processes: the number of threads may change the last bit of a matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(out: Path) -> list[dict]:
    """Everything of the metrics that does not depend on the clock."""
    return [
        {
            name: value
            for name, value in record.items()
            if name in ("step", *DETERMINISTIC) or name.startswith(("mse/", "ce/", "data/"))
        }
        for record in read_metrics(out / "metrics.jsonl")
    ]


def weights(out: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"{step:07d}" / f"{name}.safetensors")


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    assert curve(one) == curve(other)
    assert [record["step"] for record in read_metrics(one / "metrics.jsonl")][-1] == steps
    for name in ("model", "ema"):
        first, second = weights(one, steps, name), weights(other, steps, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("num_workers", "kill_at"),
    [(0, 5), (1, 7), pytest.param(3, 8, marks=pytest.mark.slow), pytest.param(0, 3, marks=pytest.mark.slow)],
)
def test_killed_run_resumes_to_the_bit(tmp_path: Path, num_workers: int, kill_at: int) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    changes = {
        "num_workers": num_workers,
        "total_steps": 9,
        "save_every": 2,
        "log_every": 3,
        "gradient_accumulation_steps": 2,
        "auto_resume": True,
    }
    settings = run_settings(bagel, tmp_path / "whole", **changes)
    train(load_config((), settings))

    settings = run_settings(bagel, tmp_path / "killed", **changes)
    killed = start(settings | {"kill_at": kill_at}, tmp_path, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = folders.latest(tmp_path / "killed" / "checkpoints")
    assert newest is not None and int(newest.name) == (kill_at - 1) // 2 * 2
    state = json.loads((newest / "ranks" / "00000.json").read_text())
    assert any(stream["buffer"] for stream in state["data"]["streams"].values()), "the case needs a row in the buffer"

    train(load_config((), settings))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", steps=9)


@pytest.mark.parametrize(("name", "num_workers"), [("SIGTERM", 2), ("SIGUSR1", 0), ("SIGINT", 2)])
def test_stop_signal_to_the_process_group_saves_and_exits_cleanly(tmp_path: Path, name: str, num_workers: int) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    changes = {"total_steps": 6, "save_every": 100, "num_workers": num_workers}
    settings = run_settings(bagel, tmp_path / "out", auto_resume=True, **changes)
    stopped = start(settings | {"kill_at": 3, "kill_with": name, "kill_group": True}, tmp_path, "stopped")
    assert stopped.returncode == 0, stopped.stderr
    assert "saved step 3" in stopped.stderr + stopped.stdout
    assert folders.steps(tmp_path / "out" / "checkpoints") == [3]
    if name != "SIGTERM":
        return
    train(load_config((), settings))
    train(load_config((), run_settings(bagel, tmp_path / "whole", **changes)))
    assert_same_run(tmp_path / "whole", tmp_path / "out", steps=6)


def test_resumed_run_saves_on_once_the_checkpoint_it_went_on_from_is_removed(tmp_path: Path) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    settings = run_settings(bagel, tmp_path / "out", total_steps=1, save_every=1, keep_last_n=1, auto_resume=True)
    train(load_config((), settings))
    train(load_config((), settings | {"total_steps": 4}))
    checkpoints = tmp_path / "out" / "checkpoints"
    assert folders.steps(checkpoints) == [4]
    assert (checkpoints / "0000004" / "ae.safetensors").read_bytes() == (bagel / "ae.safetensors").read_bytes()


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    from echo4o.train.stopping import StopRequest

    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one did not interrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_data_can_begin_anew_on_resume(tmp_path: Path) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    settings = run_settings(bagel, tmp_path / "out", total_steps=2, save_every=2, auto_resume=True)
    train(load_config((), settings))
    train(load_config((), settings | {"total_steps": 4, "num_workers": 1, "resume_data": False}))
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["data/rows"] == records[0]["data/rows"] < records[3]["data/rows"]
    assert records[3]["num_mse_tokens"] == records[1]["num_mse_tokens"], "the same packs as in the first two steps"


def test_kill_in_a_save_leaves_the_previous_checkpoint_usable(tmp_path: Path) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    settings = run_settings(bagel, tmp_path / "out", total_steps=6, save_every=2, auto_resume=True)
    killed = start(settings | {"kill_in_save": 4}, tmp_path, "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".lock", "0000002", "0000004.partial", "latest"]
    assert folders.latest(checkpoints) == checkpoints / "0000002"
    train(load_config((), settings))
    assert sorted(path.name for path in checkpoints.iterdir()) == [".lock", "0000002", "0000004", "0000006", "latest"]
    train(load_config((), run_settings(bagel, tmp_path / "whole", total_steps=6)))
    assert_same_run(tmp_path / "whole", tmp_path / "out", steps=6)
