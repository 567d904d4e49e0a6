"""LoRA and partial training as whole runs: what is trained is what is saved, loaded, merged and drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from echo4o.checkpoint import folders
from echo4o.checkpoint.adapters import load_bagel
from echo4o.checkpoint.names import is_adapter
from echo4o.checkpoint.weights import write_weights
from echo4o.config import ConfigError, load_config
from echo4o.model import Bagel
from echo4o.train import trainer as trainer_module
from echo4o.train.metrics import read_metrics
from echo4o.train.trainer import train
from tests.train.engine.zero_process import pack_of
from tests.train.launch import train_on
from tests.train.tiny_run import run_settings, write_bagel

LORA = {"lora_rank": 4, "lora_targets": "gen,heads", "lr": 3e-2, "warmup_steps": 0, "ema": 0.5}


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel"))


@torch.no_grad()
def outputs(model: Bagel) -> Tensor:
    """Hidden states of a pack with texts, a reference and a target."""
    batch, latents, noise = pack_of(("vit", "text", "reference", "text", "target"), seed=1)
    hidden = model(batch, latents, noise).last_hidden_state
    assert hidden is not None
    return hidden


@pytest.fixture
def at_the_end(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the live model computes when its run ends, and the memory that its training state takes."""
    found: dict = {}
    fit = trainer_module.Trainer.fit

    def fit_and_look(self) -> None:
        fit(self)
        engine = self.run.engine
        found["outputs"] = outputs(engine.module)
        found["trained"] = {name: piece.values.numel() for name, piece in engine.trained().items()}
        slots = sum(piece.values.nbytes for piece in engine.optimizer_slots().values())
        average = sum(tensor.nbytes for tensor in self.run.ema.shadow.values())
        found["memory"] = {"optimizer": slots, "ema": average}

    monkeypatch.setattr(trainer_module.Trainer, "fit", fit_and_look)
    return found


def test_what_was_trained_is_what_generation_loads(
    bagel: Path, tmp_path: Path, at_the_end: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_config((), run_settings(bagel, tmp_path, **LORA)))
    checkpoint = folders.latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    base = outputs(Bagel.from_pretrained(bagel))
    loaded = outputs(load_bagel(checkpoint, weights="model"))
    change = (at_the_end["outputs"] - base).norm() / base.norm()
    assert change > 0.05, "the case needs adapters that do something"
    torch.testing.assert_close(loaded, at_the_end["outputs"], rtol=1e-5, atol=1e-5)
    average = outputs(load_bagel(checkpoint))  # EMA first, as everywhere
    assert (average - base).norm() / base.norm() > 0.02 and not torch.allclose(average, loaded, atol=1e-3)

    names = sorted(at_the_end["trained"])
    assert names and all(is_adapter(name) for name in names)
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_ema.safetensors", "adapter_config.json"} <= files
    assert not any(name.startswith(("model.", "ema.", "frozen")) for name in files), "the base is named, not copied"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"base_model.model.{name}" for name in names]
    text = capsys.readouterr().out
    assert "LoRA" in text and "rank 4, alpha 8" in text


def test_a_run_goes_on_although_its_base_moved(bagel: Path, tmp_path: Path, at_the_end: dict) -> None:
    settings = run_settings(bagel, tmp_path / "whole", **LORA)
    train(load_config((), settings))
    expected = at_the_end["outputs"]
    base = write_bagel(tmp_path / "base")
    halves = run_settings(base, tmp_path / "halves", **LORA, auto_resume=True)
    train(load_config((), halves | {"total_steps": 2}))
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="not there any more.*--init_from"):
        train(load_config((), halves))
    train(load_config((), halves | {"init_from": str(tmp_path / "moved")}))
    assert torch.equal(at_the_end["outputs"], expected)
    config = json.loads((tmp_path / "halves" / "checkpoints" / "0000004" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


@pytest.mark.parametrize("changes", [{"lora_alpha": 64.0}, {"lora_rank": 2}])
def test_other_adapters_are_another_run(bagel: Path, tmp_path: Path, changes: dict) -> None:
    settings = run_settings(bagel, tmp_path, **LORA, auto_resume=True)
    train(load_config((), settings | {"total_steps": 1}))
    with pytest.raises(ConfigError, match="rank 4 and alpha 8.*--lora_alpha 8"):
        train(load_config((), settings | changes))


def test_a_base_that_changed_is_refused(bagel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_bagel(tmp_path / "base")
    settings = run_settings(base, tmp_path / "out", **LORA, auto_resume=True)
    train(load_config((), settings | {"total_steps": 2}))
    model = Bagel.from_pretrained(base)
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    write_weights(model.state_dict(), base, "model")
    with pytest.raises(ConfigError, match="is not the file that the adapters in .* were trained on.*--init_from"):
        train(load_config((), settings))
    load_bagel(tmp_path / "out" / "checkpoints" / "latest")
    assert "is not the file that the adapters" in caplog.text


def test_an_average_without_adapters_is_none_to_continue(bagel: Path, tmp_path: Path) -> None:
    base = write_bagel(tmp_path / "base")
    write_weights(Bagel.from_pretrained(bagel).state_dict(), base, "ema")
    settings = LORA | {"init_weights": "model", "ema_bias_correction": True, "total_steps": 2}
    train(load_config((), run_settings(base, tmp_path / "out", **settings)))
    training = json.loads((tmp_path / "out" / "checkpoints" / "0000002" / "training.json").read_text())
    assert training["ema_num_updates"] == 2


def test_half_precision_base(bagel: Path, tmp_path: Path) -> None:
    base = write_bagel(tmp_path / "base")
    write_weights(Bagel.from_pretrained(bagel, dtype="float16").state_dict(), base, "model")
    train(load_config((), run_settings(base, tmp_path / "out", **LORA, dtype="bfloat16", total_steps=1)))


def test_adapters_are_no_start_for_a_new_run(bagel: Path, tmp_path: Path) -> None:
    train(load_config((), run_settings(bagel, tmp_path / "a", **LORA, total_steps=1)))
    checkpoint = tmp_path / "a" / "checkpoints" / "0000001"
    with pytest.raises(ConfigError, match="echo4o merge"):
        train(load_config((), run_settings(checkpoint, tmp_path / "b")))


def test_rest_that_trains_beside_adapters_is_saved_with_them(bagel: Path, tmp_path: Path, at_the_end: dict) -> None:
    changes = LORA | {"lora_targets": "gen", "train_only": "heads"}
    train(load_config((), run_settings(bagel, tmp_path, **changes)))
    assert any(name.startswith("llm2vae") for name in at_the_end["trained"])
    loaded = load_bagel(tmp_path / "checkpoints" / "0000004", weights="model")
    torch.testing.assert_close(outputs(loaded), at_the_end["outputs"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "trains"),
    [({"train_only": "heads,connector"}, ("time_embedder", "vae2llm", "llm2vae", "connector")),
     ({"freeze_und": True}, ("language_model", "time_embedder", "vae2llm", "llm2vae"))],
)  # fmt: skip
def test_frozen_parts_cost_nothing_and_the_checkpoint_is_complete(
    bagel: Path, tmp_path: Path, at_the_end: dict, changes: dict, trains: tuple[str, ...]
) -> None:
    train(load_config((), run_settings(bagel, tmp_path, lr=1e-2, warmup_steps=0, **changes)))
    assert {name.partition(".")[0] for name in at_the_end["trained"]} == set(trains)
    assert at_the_end["memory"]["optimizer"] == 8 * sum(at_the_end["trained"].values())
    checkpoint = tmp_path / "checkpoints" / "0000004"
    loaded = Bagel.from_pretrained(checkpoint, weights="model")
    torch.testing.assert_close(outputs(loaded), at_the_end["outputs"], rtol=1e-5, atol=1e-5)
    kept = (tmp_path / "checkpoints" / "0000002" / "frozen.safetensors").stat().st_ino
    assert (checkpoint / "frozen.safetensors").stat().st_ino == kept


def test_bfloat16_base_stays_bfloat16(bagel: Path, tmp_path: Path, at_the_end: dict) -> None:
    model = Bagel.from_pretrained(bagel, dtype="bfloat16")
    half = write_bagel(tmp_path / "half")
    write_weights(model.state_dict(), half, "model")
    dtypes = {}
    set_up = trainer_module.set_up

    def look(*arguments):
        run = set_up(*arguments)
        dtypes.update({is_adapter(name): p.dtype for name, p in run.engine.module.named_parameters()})
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "set_up", look)
        train(load_config((), run_settings(half, tmp_path / "out", **LORA, dtype="bfloat16", freeze_und=True)))
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    train(load_config((), run_settings(bagel, tmp_path / "exact", **LORA, freeze_und=True)))
    rough, exact = (
        [record["loss"] for record in read_metrics(tmp_path / out / "metrics.jsonl")] for out in ("out", "exact")
    )
    assert rough == pytest.approx(exact, rel=0.01) and rough != exact


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_two_ranks_train_the_same_adapters(bagel: Path, tmp_path: Path, engine: str) -> None:
    changes = LORA | {"activation_checkpointing": "full", "lr": 1e-3}
    train(load_config((), run_settings(bagel, tmp_path / "one", **changes, gradient_accumulation_steps=2)))
    train_on(2, run_settings(bagel, tmp_path / "two", **changes, engine=engine, zero_stage=3))
    one, two = (load_bagel(tmp_path / out / "checkpoints" / "0000004", weights="model") for out in ("one", "two"))
    torch.testing.assert_close(outputs(two), outputs(one), rtol=1e-4, atol=1e-4)
    for a, b in zip(*(read_metrics(tmp_path / out / "metrics.jsonl") for out in ("one", "two")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
