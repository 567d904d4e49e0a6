"""Training checkpoints: exact round trip, complete or absent, found and pruned safely."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from echo4o.checkpoint import folders, train_state
from echo4o.checkpoint import writer as saving
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.writer import Progress
from echo4o.model import Bagel
from echo4o.train.ema import EMA
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.losses import StepTotals, micro_loss
from echo4o.train.optim import build_optimizer, freeze, trainable_parameters
from tests.model.reference import Reference


class Training:
    """A few steps of a parity case."""

    def __init__(self, folder: Path, freeze_vit: bool = False) -> None:
        self.reference = Reference(folder)
        self.engine = SingleProcessEngine("cpu")
        model = Bagel.from_pretrained(folder)
        freeze(model, freeze_vit=freeze_vit)
        self.model = self.engine.prepare(
            model, lambda module: build_optimizer(module, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15)
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
        return saving.save(folder, progress, self.engine, self.ema, assets, keep_last_n)


def names(folder: Path) -> list[str]:
    """Everything in a checkpoint folder but the link to the newest."""
    return sorted(path.name for path in folder.iterdir() if path.name != "latest")


@pytest.mark.parametrize("case", ["multiref", "extra/tied", "extra/und_only"])
def test_round_trip_continues_to_the_bit(case: str, parity: Path, tmp_path: Path) -> None:
    whole = Training(parity / case).steps(2)
    folder = whole.save(tmp_path)
    whole.steps(3)

    resumed = Training(parity / case)
    resumed.steps(1)  # state of its own, to be overwritten
    found = train_state.load(folder, resumed.engine, resumed.ema)
    resumed.losses.clear()
    resumed.steps(3)
    assert found["step"] == 2 and found["note"] == 2
    assert train_state.read_rank(folder, 0)["data"] == {"cursor": 2}
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


def test_frozen_parts_are_written_once_and_linked(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref", freeze_vit=True).steps(1)
    writer = saving.CheckpointWriter(tmp_path, training.engine, training.ema, lambda folder: None, keep_last_n=2)
    for step in (2, 3, 4):
        writer.save(Progress(step, {}, {}), wait=True)
    first, second = (tmp_path / f"000000{step}" for step in (3, 4))
    assert first.exists() and not (tmp_path / "0000002").exists()
    assert (first / "frozen.safetensors").stat().st_ino == (second / "frozen.safetensors").stat().st_ino
    for file in ("optimizer.safetensors", "model.trained.safetensors"):
        assert not any(name.startswith("vit_model") for name in load_file(second / file))
    for weights in ("model", "ema"):
        again = Bagel.from_pretrained(second, weights=weights, config=training.model.config)
        expected = training.model.state_dict() | (training.ema.shadow if weights == "ema" else {})
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    # A run that goes on from a checkpoint links that one's.
    resumed = saving.CheckpointWriter(
        tmp_path, training.engine, training.ema, lambda folder: None, frozen_file=second / "frozen.safetensors"
    )
    resumed.save(Progress(9, {}, {}), wait=True)
    assert (tmp_path / "0000009" / "frozen.safetensors").stat().st_ino == (second / "frozen.safetensors").stat().st_ino


def test_saving_goes_on_in_the_background_from_a_snapshot(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(parity / "multiref").steps(1)
    expected = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in training.ema.shadow.items()}
    may_write, create = threading.Event(), saving.create_file
    monkeypatch.setattr(saving, "create_file", lambda *args: may_write.wait(30) and create(*args))
    writer = saving.CheckpointWriter(tmp_path, training.engine, training.ema, lambda folder: None)
    assert writer.save(Progress(1, {}, {})) is None
    training.steps(2)  # training goes on while nothing is written yet
    assert writer.poll() is None and folders.steps(tmp_path) == []
    may_write.set()
    saved = writer.save(Progress(3, {}, {}))  # one in flight: waits for the first
    assert saved is not None and saved.error is None and saved.folder == tmp_path / "0000001"
    saved = writer.wait()
    assert saved is not None and saved.folder == tmp_path / "0000003" and folders.steps(tmp_path) == [1, 3]
    assert writer.wait() is None and writer.poll() is None
    model, ema = (load_file(tmp_path / "0000001" / f"{name}.safetensors") for name in ("model", "ema"))
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(ema[name], tensor) for name, tensor in average.items())


def test_other_content_than_was_written_is_noticed(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    folder = training.save(tmp_path)
    text = (folder / "training.json").read_text()
    (folder / "training.json").write_text(text.replace('"step": 2', '"step": 3'))
    assert folders.faults(folder) == ["training.json has other content than when it was written"]
    assert folders.latest(tmp_path) is None


def test_files_are_ordinary_safetensors_that_torchs_own_reader_loads(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    folder = training.save(tmp_path)
    for file in ("optimizer", "ema"):
        (folder / f"{file}.safetensors").rename(tmp_path / f"{file}.safetensors")  # its reader takes all of a folder
    expected = training.model.state_dict()
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


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
    assert folders.latest(tmp_path) is None
    assert folders.latest(tmp_path / "missing") is None
    training = Training(parity / "multiref").steps(1)
    first, second, third = (training.save(tmp_path, step=step) for step in (5, 10, 15))
    (third / "complete").unlink()  # its save was killed
    (tmp_path / "0000020.partial").mkdir()
    (tmp_path / "0000030").mkdir()  # upstream's or an empty folder
    (tmp_path / "best").mkdir()
    (tmp_path / "0000040").write_text("a file")
    assert folders.steps(tmp_path) == [5, 10]
    assert folders.latest(tmp_path) == second

    damaged = second / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert folders.latest(tmp_path) == first
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
    assert folders.is_complete(folder)
    assert names(tmp_path) == ["0000002"]


def test_keep_last_n(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    (tmp_path / "notes").mkdir()
    for step in (2, 4, 6, 8):
        training.save(tmp_path, step=step, keep_last_n=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000006", "0000008", "latest", "notes"]


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
    assert names(tmp_path) == ["0000002"]
    train_state.load(first, training.engine, training.ema)
    assert folders.is_complete(training.save(tmp_path, step=4))


def test_a_failing_asset_is_a_checkpoint_error(parity: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no such tokenizer")

    with pytest.raises(CheckpointError, match="no such tokenizer"):
        Training(parity / "multiref").steps(1).save(tmp_path, assets=fail)
    assert names(tmp_path) == []


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
    saving.link_or_copy(source, target)
    assert target.read_bytes() == b"weights"
    assert target.stat().st_ino == source.stat().st_ino
    saving.link_or_copy(source, target)
    assert target.read_bytes() == b"weights"


def test_a_linked_vae_is_linked_itself(parity: Path, tmp_path: Path) -> None:
    """As in Hugging Face's cache: the folder holds relative links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "ae").write_bytes(b"weights")
    source = tmp_path / "ae.safetensors"
    source.symlink_to("blobs/ae")
    folder = Training(parity / "multiref").save(
        tmp_path / "out", assets=lambda f: saving.link_or_copy(source, f / "ae.safetensors")
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
    assert folders.faults(folder) == ["ae.safetensors is a dangling link"]


@pytest.mark.parametrize("use", ["latest", "prune", "save"])
def test_kill_between_the_renames_of_a_replacement_loses_nothing(parity: Path, tmp_path: Path, use: str) -> None:
    training = Training(parity / "multiref")
    folder = training.save(tmp_path)
    folder.rename(tmp_path / "0000002.replaced")
    if use == "latest":
        assert folders.latest(tmp_path) == folder
    elif use == "prune":
        folders.prune(tmp_path, keep_last_n=1)
    else:
        training.save(tmp_path)
    assert names(tmp_path) == ["0000002"] and folders.is_complete(folder)


@pytest.mark.parametrize("where", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_saved(parity: Path, tmp_path: Path, where: str) -> None:
    training = Training(parity / "multiref")
    tensor = training.model.llm2vae.weight if where == "model" else training.ema.shadow["llm2vae.weight"]
    with torch.no_grad():
        tensor.view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match="llm2vae.weight.* not finite"):
        training.save(tmp_path)
    assert folders.latest(tmp_path) is None and names(tmp_path) == []


def test_a_step_saved_twice_is_replaced(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    training.save(tmp_path)
    training.steps(1)
    folder = training.save(tmp_path)
    assert names(tmp_path) == ["0000002"]
    again = Bagel.from_pretrained(folder, weights="model", config=training.model.config)
    assert torch.equal(again.llm2vae.weight, training.model.llm2vae.weight)


def test_later_checkpoints_are_set_aside_for_a_run_that_starts_before_them(parity: Path, tmp_path: Path) -> None:
    training = Training(parity / "multiref").steps(1)
    for step in (2, 4, 6):
        training.save(tmp_path, step=step)
    assert folders.set_aside_later(tmp_path, 6) is None
    moved = folders.set_aside_later(tmp_path, 2)
    assert moved is not None and sorted(path.name for path in moved.iterdir()) == ["0000004", "0000006"]
    assert folders.steps(tmp_path) == [2] and folders.steps(moved) == [4, 6]
    training.save(tmp_path, step=3)
    assert folders.set_aside_later(tmp_path, 0) == tmp_path / "earlier_run_2"


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    second = folders.claimed(tmp_path, patience=0.3)
    message = rf"another run \(process {os.getpid()} on .*--checkpoint_dir"
    with folders.claimed(tmp_path), pytest.raises(CheckpointError, match=message):
        second.__enter__()
    with folders.claimed(tmp_path, patience=0.0):
        pass  # the claim ended with the first


def test_folders_that_cannot_be_synced_are_no_obstacle(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fsync_of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    assert folders.is_complete(Training(parity / "multiref").save(tmp_path))


def test_full_disk_names_the_remedy(parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, layout: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "create_file", full)
    with pytest.raises(CheckpointError, match="No space left.*--keep_last_n"):
        Training(parity / "multiref").save(tmp_path)
