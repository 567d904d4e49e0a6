"""Evaluation on the way changes nothing of a run, and nothing that happens in it ends the run."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echo4o.checkpoint.folders import step_folder
from echo4o.checkpoint.pieces import piece_of
from echo4o.train import evaluating
from echo4o.train.ema import EMA
from echo4o.train.evaluating import SECONDS, averaged, in_words, warnings_of
from echo4o.train.metrics import MetricsFile, PictureSink, TensorBoardSink, read_metrics
from echo4o.train.trainer import train
from echo4o.train.validation import Validation
from tests.train.tiny_run import DATA, run_config, write_bagel

HELD_OUT = str(DATA / "dataset_heldout.yaml")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="an extra")


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("model") / "bagel")


def evaluations(out: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics(out / "metrics.jsonl") if SECONDS in record}


def checkpoint_bytes(out: Path, step: int) -> dict[str, bytes]:
    folder = step_folder(out / "checkpoints", step)
    told = ("complete", "config.yaml")  # they name the settings, and when it was
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in told
    }


class FakeSampler:
    """Uses every generator and the weights, as a sampler may."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.seen: list[float] = []

    def begin(self, folder: Path, step: int) -> None:
        self.begun.append(step)

    def draw(self, model, vae, tokenizer) -> Iterator[None]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        self.seen.append(float(sum(p.double().abs().sum() for p in model.parameters() if p.requires_grad)))
        yield

    def write(self, folder: Path, step: int, losses) -> dict:
        return {}


@needs_peft
def test_checkpoints_are_the_same_to_the_byte_with_evaluation_and_when_resumed(bagel: Path, tmp_path: Path) -> None:
    """With LoRA dropout, whose masks come from the global generator, and an average that is not the weights."""
    shared = {"lora_rank": 2, "lora_dropout": 0.3, "ema": 0.9, "total_steps": 4, "save_every": 2}
    asked = {"eval_every": 3, "validation_config_file": HELD_OUT, "validation_rows": 1, "eval_requests": HELD_OUT}
    train(run_config(bagel, tmp_path / "plain", **shared))
    sampler = FakeSampler()
    train(run_config(bagel, tmp_path / "evaluated", **shared, **asked), sampler)
    assert list(evaluations(tmp_path / "evaluated")) == [0, 3, 4]
    assert sampler.begun == [0] and len(set(sampler.seen)) == 3
    train(run_config(bagel, tmp_path / "resumed", **shared | {"total_steps": 2}, **asked), FakeSampler())
    train(run_config(bagel, tmp_path / "resumed", **shared, **asked, auto_resume=True), again := FakeSampler())
    assert again.begun == [2]
    for step in (2, 4):
        expected = checkpoint_bytes(tmp_path / "plain", step)
        assert {"adapter_ema.safetensors", "optimizer.safetensors", "ranks/00000.json"} <= set(expected)
        for name in ("evaluated", "resumed"):
            found = checkpoint_bytes(tmp_path / name, step)
            assert [file for file in expected if found[file] != expected[file]] == []
    one, other = evaluations(tmp_path / "evaluated"), evaluations(tmp_path / "resumed")
    assert list(other) == [0, 2, 3, 4]  # the shorter run was evaluated after its last step
    for step, record in one.items():
        assert {k: v for k, v in record.items() if k != SECONDS} == {
            k: v for k, v in other[step].items() if k != SECONDS
        }
    assert one[0]["val/mse"] != one[4]["val/mse"]
    assert (tmp_path / "evaluated" / "loss.png").stat().st_size > 0


def test_model_weights_may_be_evaluated(bagel: Path, tmp_path: Path) -> None:
    for weights in ("ema", "model"):
        config = run_config(
            bagel, tmp_path / weights, ema=0.99, lr=1e-2, eval_every=4, eval_weights=weights, validation_rows=2,
            validation_config_file=HELD_OUT,
        )  # fmt: skip
        train(config)
    ema, model = evaluations(tmp_path / "ema"), evaluations(tmp_path / "model")
    assert ema[0]["val/mse"] == model[0]["val/mse"] and ema[4]["val/mse"] > model[4]["val/mse"]


@pytest.mark.parametrize("offload", [False, True])
def test_the_average_is_swapped_in_and_back_exactly_even_after_a_failure(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "_SWAP_CHUNK", 5)
    weights = {"a": torch.randn(3, 4), "b": torch.randn(7)}
    engine = SimpleNamespace(
        trained=lambda: {name: piece_of(w) for name, w in weights.items()}, refresh_weights=lambda: None
    )
    ema = EMA(engine.trained(), 0.9, offload=offload)
    for weight in weights.values():
        weight += torch.randn_like(weight)
    before = {name: (weights[name].clone(), ema.shadow[name].clone()) for name in weights}
    with pytest.raises(RuntimeError, match="amid"), averaged(engine, ema):  # type: ignore[arg-type]
        assert all(
            torch.equal(weights[name], average.reshape(weights[name].shape)) for name, (_, average) in before.items()
        )
        raise RuntimeError("amid")
    calls = iter(range(100))
    real = evaluating._swap

    def fails_at_the_third(one, other) -> None:
        if next(calls) == 2:
            raise MemoryError
        real(one, other)

    monkeypatch.setattr(evaluating, "_swap", fails_at_the_third)
    with pytest.raises(MemoryError), averaged(engine, ema):  # type: ignore[arg-type]
        pass
    for name, (weight, average) in before.items():
        assert torch.equal(weights[name], weight) and torch.equal(ema.shadow[name], average)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory. Lower --validation_rows"),
        (KeyError("x"), "the evaluation at step 1 failed, training goes on: KeyError"),
    ],
)
def test_a_failing_evaluation_is_a_warning(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception, words: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Validation, "measure", fail)
    config = run_config(
        bagel, tmp_path, total_steps=1, eval_every=4, validation_config_file=HELD_OUT, validation_rows=1
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    assert words in caplog.text and step_folder(tmp_path / "checkpoints", 1).is_dir()


def test_results_that_cannot_be_written_are_a_warning(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = MetricsFile.write

    def full(self, step, values) -> None:
        if SECONDS in values:
            raise OSError(28, "No space left on device")
        real(self, step, values)

    class Full(FakeSampler):
        def write(self, folder, step, losses):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "write", full)
    config = run_config(bagel, tmp_path, total_steps=1, eval_every=1, eval_requests=HELD_OUT)
    with caplog.at_level(logging.WARNING):
        train(config, Full())
    assert caplog.text.count("cannot be written, training goes on") == 4  # pictures and numbers, before and after
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_stop_ends_an_evaluation_and_a_resumed_run_makes_up_for_it(bagel: Path, tmp_path: Path) -> None:
    class Stopping(FakeSampler):
        def draw(self, model, vae, tokenizer):
            if len(self.seen) == 1:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)
            yield from super().draw(model, vae, tokenizer)

    asked = {"total_steps": 3, "eval_every": 1, "eval_requests": HELD_OUT, "save_every": 1}
    train(run_config(bagel, tmp_path, **asked), Stopping())
    assert list(evaluations(tmp_path)) == [0]
    train(run_config(bagel, tmp_path, **asked, auto_resume=True), FakeSampler())
    assert list(evaluations(tmp_path)) == [0, 2, 3] and (tmp_path / "checkpoints" / "0000002").is_dir()


def test_words_and_warnings() -> None:
    losses = {
        "val/mse/a": 0.5, "val/mse/a/t_0.9": 0.4, "val/copy_reference/a": 9.0, "val/copy_reference/a/t_0.9": 0.3,
        "val/predict_mean/a": 8.0, "val/predict_mean/a/t_0.9": 0.9,
        "val/mse/b": 0.1, "val/mse/b/t_0.9": 0.2, "val/predict_mean/b": 3.0, "val/predict_mean/b/t_0.9": 0.25,
        "val/ce/b": 1.5, "val/ce/c": 2.0, "val/mse": 0.3, "val/mse/t_0.1": 0.1, "val/ce": 1.7,
    }  # fmt: skip
    assert in_words(losses) == (
        "a 0.5 (from 90% noise 0.4, copying a reference 0.3, the mean picture 0.9); "
        "b 0.1 (from 90% noise 0.2, the mean picture 0.25), text 1.5; c text 2"
    )
    (warning,) = warnings_of(losses)
    assert "on a the validation loss from 90% noise is 0.4, not below the 0.3 of copying a reference" in warning


def test_pictures_go_to_the_board(tmp_path: Path) -> None:
    from PIL import Image

    sink = TensorBoardSink(tmp_path)
    assert isinstance(sink, PictureSink) and not isinstance(MetricsFile(tmp_path), PictureSink)
    sink.write_pictures(3, {"cat": Image.new("RGB", (8, 6))})
    sink.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"samples/cat" in events.read_bytes()
