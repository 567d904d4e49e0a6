"""Training checkpoints: exact round trip, complete or absent, found and pruned safely."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from echo4o.checkpoint import train_state
from echo4o.checkpoint.train_state import CheckpointError, Progress
from echo4o.model import Bagel
from echo4o.train.ema import EMA
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.losses import StepTotals, micro_loss
from echo4o.train.optim import build_adamw, freeze, trainable_parameters
from tests.model.reference import Reference


class Training:
    """A few steps of a parity case."""

    def __init__(self, folder: Path, freeze_vit: bool = False) -> None:
        self.reference = Reference(folder)
        self.engine = SingleProcessEngine("cpu")
        model = Bagel.from_pretrained(folder)
        freeze(model, freeze_vit=freeze_vit)
        self.model = self.engine.prepare(
            model, lambda module: build_adamw(module, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15)
        )
        self.ema = EMA(trainable_parameters(model), 0.9)
        self.losses: list[float] = []

    def steps(self, count: int) -> Training:
        batch = self.reference.batch()
        totals = StepTotals(*StepTotals.local([batch], False).tolist())
        for _ in range(count):
            output = self.model(batch, self.reference.latents(), self.reference.noise(), return_hidden=False)
            loss = micro_loss(output.mse, output.ce, batch, totals)
            self.engine.backward(loss.total)
            self.engine.clip_grad_norm(1.0)
            self.engine.step()
            self.engine.zero_grad()
            self.ema.update()
            self.losses.append(loss.total.item())
        return self

    def save(self, folder: Path, step: int = 2, keep_last_n: int = 0, assets=lambda folder: None) -> Path:
        progress = Progress(step, {"note": step}, {"data": {"cursor": step}})
        return train_state.save(folder, progress, self.engine, self.ema, assets, keep_last_n)


@pytest.mark.parametrize("case", ["multiref", "extra/tied", "extra/und_only"])
def test_round_trip_continues_to_the_bit(case: str, parity: Path, tmp_path: Path) -> None:
    whole = Training(parity / case).steps(2)
    folder = whole.save(tmp_path)
    whole.steps(3)

    resumed = Training(parity / case)
    resumed.steps(1)  # state of its own, to be overwritten
    progress = train_state.load(folder, resumed.engine, resumed.ema)
    resumed.losses.clear()
    resumed.steps(3)
    assert progress.step == 2 and progress.trainer["note"] == 2 and progress.rank == {"data": {"cursor": 2}}
    assert resumed.losses == whole.losses[2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    for name, tensor in whole.ema.shadow.items():
        assert torch.equal(tensor, resumed.ema.shadow[name]), name


def test_weights_files_bear_upstreams_names_and_hold_everything(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "extra" / "tied", freeze_vit=True).steps(2)
    folder = training.save(tmp_path)
    for weights in ("model", "ema"):
        again = Bagel.from_pretrained(folder, weights=weights, config=training.model.config)
        expected = {**training.model.state_dict(), **(training.ema.shadow if weights == "ema" else {})}
        expected["language_model.lm_head.weight"] = expected["language_model.model.embed_tokens.weight"]
        assert again.state_dict().keys() == expected.keys()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_frozen_parts_take_no_room_in_the_training_state(parity: Path, tmp_path: Path) -> None:
    everything = Training(parity / "multiref").steps(1).save(tmp_path / "a")
    frozen = Training(parity / "multiref", freeze_vit=True).steps(1).save(tmp_path / "b")

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in (folder / "training").iterdir())

    assert size(frozen) < size(everything)


def test_other_frozen_parts_are_refused_with_the_remedy(parity: Path, tmp_path: Path) -> None:
    folder = Training(parity / "multiref", freeze_vit=True).steps(1).save(tmp_path)
    with pytest.raises(CheckpointError, match="did not train .*init_from"):
        other = Training(parity / "multiref")
        train_state.load(folder, other.engine, other.ema)
    folder = Training(parity / "multiref").steps(1).save(tmp_path, step=3)
    with pytest.raises(CheckpointError, match="now frozen"):
        other = Training(parity / "multiref", freeze_vit=True)
        train_state.load(folder, other.engine, other.ema)


def test_random_generators_continue(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    folder = training.save(tmp_path)
    expected = (torch.rand(3).tolist(), random.random(), np.random.random())
    train_state.load(folder, training.engine, training.ema)
    assert (torch.rand(3).tolist(), random.random(), np.random.random()) == expected


def test_latest_passes_over_incomplete_and_foreign_names(parity: Path, tmp_path: Path) -> None:
    assert train_state.latest(tmp_path) is None
    assert train_state.latest(tmp_path / "missing") is None
    training = Training(parity / "multiref").steps(1)
    first, second, third = (training.save(tmp_path, step=step) for step in (5, 10, 15))
    (third / "complete").unlink()  # its save was killed
    (tmp_path / "0000020.partial").mkdir()
    (tmp_path / "0000030").mkdir()  # upstream's or an empty folder
    (tmp_path / "best").mkdir()
    (tmp_path / "0000040").write_text("a file")
    assert train_state.steps(tmp_path) == [5, 10]
    assert train_state.latest(tmp_path) == second

    damaged = second / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train_state.latest(tmp_path) == first
    with pytest.raises(CheckpointError, match="model.safetensors has .* bytes instead of"):
        train_state.load(second, training.engine, training.ema)
    with pytest.raises(CheckpointError, match="interrupted"):
        train_state.load(third, training.engine, training.ema)


def test_an_interrupted_save_of_the_same_step_is_replaced(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    (tmp_path / "0000002").mkdir()
    (tmp_path / "0000002" / "model.safetensors").write_text("cut off")
    (tmp_path / "0000002.partial").mkdir()
    folder = training.save(tmp_path)
    assert train_state.is_complete(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000002"]


def test_keep_last_n(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    (tmp_path / "notes").mkdir()
    for step in (2, 4, 6, 8):
        training.save(tmp_path, step=step, keep_last_n=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000006", "0000008", "notes"]


def test_full_disk_fails_cleanly_and_keeps_the_previous(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    first = training.save(tmp_path, step=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10_000, 800_000):  # in the training state, in the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="0000004"):
                training.save(tmp_path, step=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["0000002"]
    train_state.load(first, training.engine, training.ema)
    assert train_state.is_complete(training.save(tmp_path, step=4))


def test_a_failing_asset_is_a_checkpoint_error(parity: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no such tokenizer")

    with pytest.raises(CheckpointError, match="no such tokenizer"):
        Training(parity / "multiref").steps(1).save(tmp_path, assets=fail)
    assert list(tmp_path.iterdir()) == []


def test_marker_lists_every_file(parity: Path, tmp_path: Path) -> None:
    folder = (
        Training(parity / "multiref").steps(1).save(tmp_path, assets=lambda f: (f / "a.txt").write_text("x") and None)
    )
    listed = json.loads((folder / "complete").read_text())["files"]
    found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    found.pop("complete")
    assert listed == found


def test_link_or_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "ae.safetensors", tmp_path / "copy.safetensors"
    source.write_bytes(b"weights")
    train_state.link_or_copy(source, target)
    assert target.read_bytes() == b"weights"
    assert target.stat().st_ino == source.stat().st_ino
    train_state.link_or_copy(source, target)
    assert target.read_bytes() == b"weights"


def test_a_linked_vae_is_linked_itself(parity: Path, tmp_path: Path) -> None:
    """As in Hugging Face's cache: the folder holds relative links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "ae").write_bytes(b"weights")
    source = tmp_path / "ae.safetensors"
    source.symlink_to("blobs/ae")
    folder = Training(parity / "multiref").save(
        tmp_path / "out", assets=lambda f: train_state.link_or_copy(source, f / "ae.safetensors")
    )
    copy = folder / "ae.safetensors"
    assert not copy.is_symlink() and copy.read_bytes() == b"weights"
    assert "ae.safetensors" in json.loads((folder / "complete").read_text())["files"]


def test_dangling_link_is_not_published_and_not_complete(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref")
    with pytest.raises(CheckpointError, match="ae.safetensors is neither a file nor a folder"):
        training.save(tmp_path, assets=lambda f: (f / "ae.safetensors").symlink_to("nowhere"))
    folder = training.save(tmp_path)
    (folder / "ae.safetensors").symlink_to("nowhere")
    assert train_state.faults(folder) == ["ae.safetensors is a dangling link"]


@pytest.mark.parametrize("use", ["latest", "prune", "save"])
def test_kill_between_the_renames_of_a_replacement_loses_nothing(parity: Path, tmp_path: Path, use: str) -> None:
    training = Training(parity / "multiref")
    folder = training.save(tmp_path)
    folder.rename(tmp_path / "0000002.replaced")
    if use == "latest":
        assert train_state.latest(tmp_path) == folder
    elif use == "prune":
        train_state.prune(tmp_path, keep_last_n=1)
    else:
        training.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000002"] and train_state.is_complete(folder)


@pytest.mark.parametrize("where", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_saved(parity: Path, tmp_path: Path, where: str) -> None:
    training = Training(parity / "multiref")
    tensor = training.model.llm2vae.weight if where == "model" else training.ema.shadow["llm2vae.weight"]
    with torch.no_grad():
        tensor.view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match="llm2vae.weight.* not finite"):
        training.save(tmp_path)
    assert train_state.latest(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_a_step_saved_twice_is_replaced(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    training.save(tmp_path)
    training.steps(1)
    folder = training.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000002"]
    again = Bagel.from_pretrained(folder, weights="model", config=training.model.config)
    assert torch.equal(again.llm2vae.weight, training.model.llm2vae.weight)


def test_later_checkpoints_are_set_aside_for_a_run_that_starts_before_them(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    for step in (2, 4, 6):
        training.save(tmp_path, step=step)
    assert train_state.set_aside_later(tmp_path, 6) is None
    moved = train_state.set_aside_later(tmp_path, 2)
    assert moved is not None and sorted(path.name for path in moved.iterdir()) == ["0000004", "0000006"]
    assert train_state.steps(tmp_path) == [2] and train_state.steps(moved) == [4, 6]
    training.save(tmp_path, step=3)
    assert train_state.set_aside_later(tmp_path, 0) == tmp_path / "earlier_run_2"
