"""The command line: what it lists, what it passes on, and how it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from echo4o import cli
from echo4o.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()


@pytest.fixture
def started(monkeypatch):
    """Settings that training was started with, instead of training."""
    configs = []
    monkeypatch.setattr("echo4o.train.trainer.train", lambda config, sampler: configs.append(config))
    return configs


def test_train_passes_the_command_line_on(started, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3.0e-5\n")
    result = runner.invoke(cli.app, ["train", str(path), "--warmup-steps", "7", "--auto_resume", "True"])
    assert result.exit_code == 0, result.output
    (config,) = started
    assert (config.training.lr, config.training.warmup_steps, config.training.auto_resume) == (3e-5, 7, True)


def test_train_help_lists_flags_and_trains_nothing(started):
    result = runner.invoke(cli.app, ["train", "--help"])
    assert result.exit_code == 0
    assert "--vae_cond_dropout_prob" in result.output
    assert not started


def test_wrong_setting_is_one_line_and_status_2(started):
    result = runner.invoke(cli.app, ["train", "--lrr", "1"])
    assert result.exit_code == 2
    assert result.output.strip().splitlines() == ["ConfigError: unknown setting 'lrr' (command line). Did you mean lr?"]
    assert not started


def test_bug_keeps_its_traceback(monkeypatch):
    def broken(config, sampler):
        raise KeyError("a bug")

    monkeypatch.setattr("echo4o.train.trainer.train", broken)
    assert isinstance(runner.invoke(cli.app, ["train"]).exception, KeyError)


def test_interrupt_is_one_line(monkeypatch):
    def interrupted(config, sampler):
        raise KeyboardInterrupt

    monkeypatch.setattr("echo4o.train.trainer.train", interrupted)
    result = runner.invoke(cli.app, ["train"])
    assert (result.exit_code, result.output.strip()) == (130, "interrupted")


def test_errors_with_a_remedy_are_known_by_their_classes():
    from echo4o.checkpoint.folders import CheckpointError
    from echo4o.data.errors import DataError
    from echo4o.model.attention import KernelError
    from echo4o.train.failures import USER_ERRORS
    from echo4o.train.processes import RendezvousError
    from echo4o.train.trainer import NonFiniteError, RunError

    classes = (ConfigError, DataError, CheckpointError, NonFiniteError, KernelError, RunError, RendezvousError)
    assert set(USER_ERRORS) == {kind.__name__ for kind in classes}


def test_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "layout.png"
    result = runner.invoke(cli.app, ["data", "draw", str(ROOT / "data_examples" / "dataset.yaml"), "--out", str(out)])
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith(f"DataError: cannot write {out}: ")


def test_picture_of_unknown_kind_is_one_line(tmp_path):
    out = tmp_path / "layout.foo"
    result = runner.invoke(cli.app, ["data", "draw", str(ROOT / "data_examples" / "dataset.yaml"), "--out", str(out)])
    assert result.exit_code == 1 and "a picture ends in one of .png" in result.output


def test_upstream_script_starts_the_same_thing():
    """Without model and data both starts end with the same message."""
    outputs = []
    for start in (["scripts/train.py"], ["-m", "echo4o.cli", "train"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *start, "--dataset_config_file", "no/such.yaml", "--num_worker", "1"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        outputs.append(done.stderr.strip().splitlines()[-1])
    assert outputs[0] == outputs[1]
    assert "dataset_config_file is no/such.yaml (command line), which is not a file" in outputs[0]


def test_every_benchmark_is_a_verb():
    from echo4o.cli.evaluation import BENCHMARKS
    from echo4o.evaluate.benchmarks import BENCHMARKS as KNOWN

    assert set(BENCHMARKS) == set(KNOWN)
    listed = runner.invoke(cli.app, ["eval", "list"])
    assert listed.exit_code == 0 and all(name in listed.output for name in BENCHMARKS)
    wrong = runner.invoke(cli.app, ["eval", "geneval++", "--out", "nowhere", "--set", "num_timesteps"])
    assert wrong.exit_code == 2 and "write NAME=VALUE" in wrong.output
