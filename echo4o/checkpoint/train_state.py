"""Training checkpoints ``{checkpoint_dir}/{step:07d}/``: complete or absent, and everything a run needs to go on.

::

    0000100/
      complete                 marker, written last: sizes of all files, hashes of headers and of the small ones
      training.json            step, EMA updates, running loss means, world size
      ranks/00000.json         random generators and data stream of each rank
      optimizer.safetensors    {name}.exp_avg, {name}.exp_avg_sq
      model.safetensors        float32, upstream's names, everything included
      ema.safetensors
      config.yaml              the run's settings
      llm_config.json …        what generation needs: configs, tokenizer, ae.safetensors

Where parts are frozen, ``model.safetensors`` becomes an index over ``model.trained.safetensors`` and
``frozen.safetensors``, which is written once and hard-linked into the following checkpoints. With LoRA,
``adapter_model.safetensors`` and ``adapter_ema.safetensors`` (peft's format) stand for them, and the base is named.

Every process writes its own bytes of these files and reads its own bytes: nothing is gathered, and any number of
processes of any engine can go on. Saving takes a snapshot and writes it in a thread.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from echo4o.checkpoint.folders import FORMAT, CheckpointError, faults, prune, publish, step_folder
from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter, public_name
from echo4o.checkpoint.pieces import Piece
from echo4o.checkpoint.rng import rng_state, set_rng_state
from echo4o.checkpoint.shared_file import FileLayout, SharedFile, create_file, plan_file
from echo4o.checkpoint.slices import WeightsReader
from echo4o.checkpoint.weights import non_finite, write_text

if TYPE_CHECKING:
    from echo4o.train.ema import EMA
    from echo4o.train.engine import Engine

logger = logging.getLogger(__name__)

TRAINING = "training.json"
OPTIMIZER = "optimizer.safetensors"
FROZEN = "frozen.safetensors"
#: Files with what trains, by kind of weights: all of it, beside frozen parts, and LoRA's.
WHOLE = {"model": "model.safetensors", "ema": "ema.safetensors"}
TRAINED = {"model": "model.trained.safetensors", "ema": "ema.trained.safetensors"}
ADAPTER = {"model": "adapter_model.safetensors", "ema": "adapter_ema.safetensors"}

_FAILURES = (OSError, RuntimeError, ValueError)


@dataclass
class Progress:
    """What of a checkpoint is not a tensor.

    Attributes:
        step: optimiser steps taken.
        trainer: JSON-able state shared by all ranks.
        rank: JSON-able state of this rank (data stream).
    """

    step: int
    trainer: dict[str, Any]
    rank: dict[str, Any]


@dataclass
class Saved:
    """How a save ended: `error` is None if it is complete."""

    folder: Path
    seconds: float
    stalled: float
    error: CheckpointError | None = None


@dataclass
class _Snapshot:
    """Everything that one process writes, on the CPU and apart from the live tensors."""

    progress: Progress
    training: dict[str, Any]
    rank: dict[str, Any]
    #: File → name in it → this process' piece.
    files: dict[str, dict[str, Piece]]
    tensors: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    started: float
    stalled: float = 0.0
    layouts: dict[str, FileLayout] = field(default_factory=dict)


class CheckpointWriter:
    """Saves a run's state, one save at a time; each of its methods is called by all ranks alike.

    Args:
        write_assets: writes configs, tokenizer and VAE into the folder it is given (called on rank 0).
        keep_last_n, keep_every: older checkpoints are removed after a save (`echo4o.checkpoint.folders.prune`).
        asynchronous: write in a thread; False writes at once, without a copy of the state in host memory.
        frozen_file: ``frozen.safetensors`` of the checkpoint that this run goes on from.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        engine: Engine,
        ema: EMA,
        write_assets: Callable[[Path], None],
        *,
        keep_last_n: int = 0,
        keep_every: int = 0,
        asynchronous: bool = True,
        frozen_file: Path | None = None,
    ) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        self.asynchronous = asynchronous
        self._engine, self._ema, self._write_assets = engine, ema, write_assets
        self._keep = (keep_last_n, keep_every)
        self._processes = engine.processes.apart()
        self._frozen_file = frozen_file
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._inventory = _Inventory.of(engine)

    # ------------------------------------------------------------ from the training loop

    def save(self, progress: Progress, *, wait: bool = False) -> Saved | None:
        """Write a checkpoint; returns how the save ended that was still under way, if any.

        Args:
            wait: return only when it is written (the last save of a run).

        Raises:
            CheckpointError: with `wait` or without `asynchronous`, if it cannot be written.
        """
        before = self.wait()
        started = time.perf_counter()
        aside = self.asynchronous and not wait
        snapshot = self._snapshot(progress, started, copy=aside)
        snapshot.stalled = time.perf_counter() - started
        if aside:
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
            return before
        self._write(snapshot)
        saved, self._saved = self._saved, None
        assert saved is not None
        saved.stalled = saved.seconds
        if saved.error is not None:
            raise saved.error
        self._saved = saved
        return before

    def poll(self) -> Saved | None:
        """How a save ended since the last look, without waiting for one."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Let the save under way end; how it did (once)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        saved, self._saved = self._saved, None
        return saved

    # ------------------------------------------------------------ snapshot

    def _snapshot(self, progress: Progress, started: float, copy: bool) -> _Snapshot:
        engine = self._engine
        pieces = {"model": engine.trained(), "ema": self._ema.pieces(), "optimizer": engine.optimizer_slots()}
        files = self._inventory.files(pieces, engine.frozen())
        tensors = {
            file: {name: (piece.values.dtype, piece.shape) for name, piece in content.items()}
            for file, content in files.items()
        }
        owned = {
            file: {name: piece for name, piece in content.items() if piece.owned and piece.values.numel()}
            for file, content in files.items()
        }
        if copy:
            owned = {
                # Frozen weights do not change under the writer's hands.
                file: content if file == FROZEN else {n: self._copy(file, n, p) for n, p in content.items()}
                for file, content in owned.items()
            }
        training = {
            "format": FORMAT,
            "step": progress.step,
            "world_size": engine.world_size,
            "trained": sorted(pieces["model"]),
            "ema_num_updates": self._ema.num_updates,
            "optimizer_steps": engine.optimizer_steps(),
            **progress.trainer,
        }
        return _Snapshot(progress, training, progress.rank | {"rng": rng_state()}, owned, tensors, started)

    def _copy(self, file: str, name: str, piece: Piece) -> Piece:
        """The piece in a buffer of ours, kept for the next save."""
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != piece.values.shape or buffer.dtype != piece.values.dtype:
            buffer = torch.empty(piece.values.shape, dtype=piece.values.dtype)
            self._buffers[file, name] = buffer
        buffer.copy_(piece.values)
        return Piece(piece.shape, piece.start, buffer, piece.owned)

    # ------------------------------------------------------------ writing (in the thread)

    def _write(self, snapshot: _Snapshot) -> None:
        folder = step_folder(self.checkpoint_dir, snapshot.progress.step)
        partial = folder.with_name(f"{folder.name}.partial")
        error = None
        try:
            linked = self._together(lambda: self._begin(partial, snapshot), folder)[0]
            self._together(lambda: self._write_own(partial, snapshot, linked), folder)
            self._together(lambda: self._complete(partial, folder, snapshot), folder)
            self._frozen_file = folder / FROZEN if FROZEN in snapshot.tensors else None
        except CheckpointError as failure:
            error = failure
            if self._processes.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        except Exception as failure:  # another process died: the training loop hears of it as well
            error = CheckpointError(f"cannot write {folder}: {_reason(failure)}")
        seconds = time.perf_counter() - snapshot.started
        self._saved = Saved(folder, seconds, snapshot.stalled, error)

    def _together(self, work: Callable[[], Any], folder: Path) -> list[Any]:
        """`work` on every rank; its results, by rank.

        Raises:
            CheckpointError: on every rank, if it failed on any.
        """
        result, failure = None, None
        try:
            result = work()
        except _FAILURES as error:
            where = (
                f" (rank {self._processes.rank} on {self._processes.host})" if self._processes.world_size > 1 else ""
            )
            failure = f"{_reason(error)}{where}"
        outcomes = self._processes.gather((result, failure))
        if failed := next((failure for _, failure in outcomes if failure is not None), None):
            raise CheckpointError(f"cannot write {folder}: {failed}")
        return [result for result, _ in outcomes]

    def _begin(self, partial: Path, snapshot: _Snapshot) -> bool:
        """Rank 0 makes the folder and its files; True if the frozen weights are there already."""
        snapshot.layouts = {file: plan_file(tensors) for file, tensors in snapshot.tensors.items()}
        if self._processes.rank:
            return False
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "ranks").mkdir(parents=True)
        linked = False
        if FROZEN in snapshot.layouts and self._frozen_file is not None and self._frozen_file.is_file():
            link_or_copy(self._frozen_file, partial / FROZEN)
            linked = True
        for file, layout in snapshot.layouts.items():
            if not (linked and file == FROZEN):
                create_file(partial / file, layout)
        return linked

    def _write_own(self, partial: Path, snapshot: _Snapshot, linked: bool) -> None:
        self._require_finite(snapshot)
        for file, content in snapshot.files.items():
            if (linked and file == FROZEN) or not content:
                continue
            with SharedFile(partial / file, snapshot.layouts[file]) as shared:
                for name, piece in content.items():
                    shared.write(name, piece.start, piece.values.cpu())
        write_text(partial / "ranks" / f"{self._processes.rank:05d}.json", json.dumps(snapshot.rank))

    def _require_finite(self, snapshot: _Snapshot) -> None:
        """A checkpoint whose weights are not numbers would be taken for the newest good one."""
        for file, content in snapshot.files.items():
            if file in (OPTIMIZER, FROZEN):
                continue
            if bad := non_finite({name: piece.values for name, piece in content.items()}):
                name = bad[0].removeprefix(ADAPTER_PREFIX) + (" (EMA)" if "ema" in file else "")
                raise ValueError(
                    f"{name} holds numbers that are not finite. Resume from an earlier checkpoint with a lower --lr"
                )

    def _complete(self, partial: Path, folder: Path, snapshot: _Snapshot) -> None:
        if self._processes.rank:
            return
        write_text(partial / TRAINING, json.dumps(snapshot.training))
        for name, text in self._inventory.indexes(snapshot.tensors).items():
            write_text(partial / name, text)
        self._write_assets(partial)
        publish(partial, folder, snapshot.progress.step)
        prune(self.checkpoint_dir, *self._keep)


def save(
    checkpoint_dir: str | Path,
    progress: Progress,
    engine: Engine,
    ema: EMA,
    write_assets: Callable[[Path], None],
    keep_last_n: int = 0,
    keep_every: int = 0,
) -> Path:
    """One checkpoint, written at once; see `CheckpointWriter`, which a run uses.

    Raises:
        CheckpointError: if anything fails; earlier checkpoints are untouched then.
    """
    writer = CheckpointWriter(
        checkpoint_dir, engine, ema, write_assets, keep_last_n=keep_last_n, keep_every=keep_every, asynchronous=False
    )
    writer.save(progress)
    return step_folder(checkpoint_dir, progress.step)


@dataclass
class _Inventory:
    """Which tensor goes into which file.

    Attributes:
        tables: fixed tables, written with what trains: small, and part of every BAGEL checkpoint.
        tied: further name → name of parameters that bear two.
        layered: parts of the model are frozen and lie in a file of their own.
        adapted: LoRA; the frozen base is named, not written.
    """

    tables: set[str]
    tied: dict[str, str]
    layered: bool
    adapted: bool

    @classmethod
    def of(cls, engine: Engine) -> _Inventory:
        names = getattr(engine.module, "table_names", list)()
        frozen = set(engine.frozen()) - set(names)
        adapted = any(is_adapter(name) for name in engine.trained())
        tied = {public_name(name): public_name(first) for name, first in tied_names(engine.module).items()}
        return cls(set(names), tied, bool(frozen) and not adapted, adapted)

    def files(
        self, pieces: Mapping[str, Mapping[str, Piece]], frozen: Mapping[str, Piece]
    ) -> dict[str, dict[str, Piece]]:
        """File → name in the file → piece."""
        result: dict[str, dict[str, Piece]] = {OPTIMIZER: dict(pieces["optimizer"])}
        fixed = {} if self.adapted else {name: piece for name, piece in frozen.items() if name in self.tables}
        for kind in ("model", "ema"):
            weights = {name: piece for name, piece in pieces[kind].items() if not is_adapter(name)}
            adapters = {ADAPTER_PREFIX + name: piece for name, piece in pieces[kind].items() if is_adapter(name)}
            if adapters:
                result[ADAPTER[kind]] = adapters
            if weights or not adapters:
                separate = self.layered or self.adapted
                result[(TRAINED if separate else WHOLE)[kind]] = self._with_tied(weights | fixed)
        if self.layered:
            rest = {name: piece for name, piece in frozen.items() if name not in self.tables}
            result[FROZEN] = self._with_tied(rest)
        return result

    def _with_tied(self, content: dict[str, Piece]) -> dict[str, Piece]:
        twins = {name: content[first] for name, first in self.tied.items() if first in content}
        return content | twins

    def indexes(self, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Where weights lie in two files: ``model.safetensors.index.json`` and EMA's make them one model."""
        if not self.layered:
            return {}
        texts = {}
        for kind in ("model", "ema"):
            weight_map = {name: file for file in (FROZEN, TRAINED[kind]) for name in tensors[file]}
            entries = [entry for file in (FROZEN, TRAINED[kind]) for entry in tensors[file].values()]
            size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in entries)
            content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            texts[f"{WHOLE[kind]}.index.json"] = json.dumps(content, indent=2) + "\n"
        return texts


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further name → first name of parameters that bear several."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---------------------------------------------------------------- load


def weights_of(folder: str | Path, kind: str = "model") -> list[WeightsReader]:
    """Readers of what a checkpoint holds of the model, adapters first; a LoRA checkpoint's base is not among them.

    Args:
        kind: ``model`` or ``ema``.
    """
    folder = Path(folder)
    found = [(folder / ADAPTER[kind], ADAPTER_PREFIX), (folder / TRAINED[kind], ""), (folder / WHOLE[kind], "")]
    readers = [WeightsReader(path, prefix) for path, prefix in found if path.is_file()]
    return readers + ([WeightsReader(folder / FROZEN)] if (folder / FROZEN).is_file() else [])


def read_training(folder: str | Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself.

    Raises:
        CheckpointError: if it is incomplete, damaged, or of another version.
    """
    folder = Path(folder)
    if wrong := faults(folder):
        raise CheckpointError(
            f"{folder} cannot be resumed: {'; '.join(wrong[:3])}. Take an earlier one, or start from its weights "
            "alone: --init_from with another --checkpoint_dir."
        )
    try:
        training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / TRAINING} cannot be read ({error}); take an earlier checkpoint") from error
    if training["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has format {training['format']}, this version reads {FORMAT}: start from its weights with "
            "--init_from and another --checkpoint_dir"
        )
    return training


def read_rank(folder: str | Path, rank: int) -> dict[str, Any]:
    """The state that `rank` saved.

    Raises:
        CheckpointError: if there was no such rank.
    """
    path = Path(folder) / "ranks" / f"{rank:05d}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): was {folder} written by more ranks?") from error


def load(folder: str | Path, engine: Engine, ema: EMA, *, weights: bool = True) -> dict[str, Any]:
    """Continue exactly: fills the EMA and the optimiser, and sets the random generators.

    Args:
        weights: also fill what trains (the engine may have been prepared from this folder already).

    Returns:
        The checkpoint's ``training.json``; `read_rank` gives what each rank saved.

    Raises:
        CheckpointError: if files are missing or damaged, or the checkpoint trains something else.
    """
    folder = Path(folder)
    training = read_training(folder)
    trained = engine.trained()
    _check_same_parameters(set(training["trained"]), set(trained), folder)
    try:
        _fill(weights_of(folder, "ema"), ema.pieces(), folder)
        if weights:
            _fill(weights_of(folder, "model"), trained, folder)
        optimizer = WeightsReader(folder / OPTIMIZER)
        slots = engine.optimizer_slots(create=optimizer.shapes)
        _fill([optimizer], slots, folder)
        engine.set_optimizer_steps({name: n for name, n in training["optimizer_steps"].items() if name in trained})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be resumed: {_reason(error)}") from error
    engine.refresh()
    ema.num_updates = int(training["ema_num_updates"])
    if training["world_size"] == engine.world_size:
        set_rng_state(read_rank(folder, engine.rank)["rng"])
    return training


def _fill(readers: Sequence[WeightsReader], pieces: Mapping[str, Piece], folder: Path) -> None:
    for name, piece in pieces.items():
        reader = next((reader for reader in readers if name in reader), None)
        if reader is None:
            raise ValueError(f"it lacks {name}")
        reader.fill(name, piece)


def _check_same_parameters(saved: set[str], trained: set[str], folder: Path) -> None:
    remedy = (
        "resume with the freeze, train_only and lora settings of its config.yaml, or start anew from its weights: "
        "--init_from with another --checkpoint_dir"
    )
    if missing := sorted(trained - saved):
        raise CheckpointError(
            f"{folder} did not train {len(missing)} parameters that now do, e.g. {missing[0]}: {remedy}"
        )
    if extra := sorted(saved - trained):
        raise CheckpointError(
            f"{folder} trained {len(extra)} parameters that are now frozen, e.g. {extra[0]}: {remedy}"
        )


# ---------------------------------------------------------------- files


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, so that the VAE costs no space in each checkpoint; copy where the file system cannot."""
    with suppress(FileNotFoundError):
        target.unlink()
    source = Path(os.path.realpath(source))  # os.link would link a link itself; Hugging Face's caches are made of them
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
