"""Metrics files, sinks, console and plot."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from echo4o.config import ConfigError
from echo4o.train.console import ConsoleProgress, summary_line
from echo4o.train.metrics import MetricsFile, TensorBoardSink, WandbSink, plot_losses, read_metrics


def test_resuming_drops_what_came_after_and_a_cut_off_line(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(1, 6):
        first.write(step, {"loss": step / 3})
    first.close()
    with open(first.path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    again = MetricsFile(tmp_path, resume_step=3)
    again.write(4, {"loss": 0.1})
    again.close()
    records = read_metrics(again.path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["loss"] == 1 / 3 and records[-1]["loss"] == 0.1


def test_a_new_run_sets_the_old_file_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        sink = MetricsFile(tmp_path)
        sink.write(1, {"loss": value})
        sink.close()
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [read_metrics(tmp_path / name)[0]["loss"] for name in names] == [1.0, 2.0, 3.0]


def test_lines_are_json_even_for_infinite_numbers(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path)
    sink.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4})
    sink.close()
    assert json.loads(sink.path.read_text()) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4}


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.write(3, {"loss": 0.5, "ce": None})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_wandb_missing_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        WandbSink(tmp_path, project="p", name="n", run_id="0", resume="allow", offline=True, config={})


def test_wandb_run_id_is_upstreams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        logged: list = []

        class Settings:
            def __init__(self, init_timeout: int) -> None:
                self.init_timeout = init_timeout

        @classmethod
        def init(cls, **options):
            cls.options = options
            return cls()

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.logged.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    sink = WandbSink(tmp_path, project="p", name="n", run_id="7", resume="must", offline=True, config={"lr": 1})
    sink.write(2, {"loss": 1.0})
    sink.close()
    assert Fake.options["id"] == "n-run7" and Fake.options["mode"] == "offline" and Fake.options["resume"] == "must"
    assert Fake.options["settings"].init_timeout == 120
    assert Fake.logged == [(2, {"loss": 1.0}), "finished"]


def test_plot(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path)
    assert plot_losses(sink.path, tmp_path / "loss.png") is None
    for step in range(1, 20):
        sink.write(step, {"loss": 2 / step, "mse": 1 / step, "ce": 1 / step})
    sink.close()
    picture = plot_losses(sink.path, tmp_path / "loss.png")
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")


def test_console_writes_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    values = {
        "loss": 1.25,
        "mse": 1.25,
        "ce": None,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_sec": 1234.5,
        "skipped_steps": 2,
    }
    with ConsoleProgress(10, 0, Console(file=stream, width=200)) as console:
        console.advance(1)
        console.log(2, values)
        console.say("saved [x]")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 2/10  loss 1.2500  mse 1.2500  lr 1.00e-04  grad 0.500  1,23")
    assert "skipped 2" in lines[0] and "ce" not in summary_line(values)
    assert lines[1] == "saved [x]"


def test_console_shows_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    with ConsoleProgress(4, 1, Console(file=stream, width=200, force_terminal=True)) as console:
        console.advance(2)
        console.log(3, {"loss": 0.5})
    assert "3/4" in stream.getvalue() and "loss 0.5000" in stream.getvalue()


def test_only_the_first_rank_talks() -> None:
    stream = io.StringIO()
    with ConsoleProgress(4, 0, Console(file=stream), enabled=False) as console:
        console.log(1, {"loss": 0.5})
        console.say("hello")
    assert stream.getvalue() == ""


def test_wandb_that_cannot_be_used_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_):
        raise ConnectionError("api.wandb.ai is not reachable\nlong trace")

    wandb = types.SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError, match=r"not reachable\).*--wandb False") as error:
        WandbSink(tmp_path, project="p", name="n", run_id="0", resume="allow", offline=False, config={})
    assert len(str(error.value).splitlines()) == 1
