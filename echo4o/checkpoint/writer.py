"""Saving a run: a snapshot, written in a thread by all processes at once, complete or absent."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from echo4o.checkpoint.folders import FORMAT, CheckpointError, prune, publish, step_folder
from echo4o.checkpoint.inventory import FROZEN, OPTIMIZER, TRAINING, Inventory
from echo4o.checkpoint.names import ADAPTER_PREFIX
from echo4o.checkpoint.pieces import Piece
from echo4o.checkpoint.rng import rng_state
from echo4o.checkpoint.shared_file import FileLayout, SharedFile, create_file, plan_file
from echo4o.checkpoint.weights import non_finite, write_text

if TYPE_CHECKING:
    from echo4o.train.ema import EMA
    from echo4o.train.engine import Engine

logger = logging.getLogger(__name__)


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
        on_progress: called now and then while training waits for a save.
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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        self.asynchronous = asynchronous
        self._engine, self._ema, self._write_assets = engine, ema, write_assets
        self._keep = (keep_last_n, keep_every)
        self._processes = engine.processes.apart()
        self._frozen_file = frozen_file
        self._on_progress = on_progress
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._inventory = Inventory.of(engine)
        self._broken = False

    # ------------------------------------------------------------ from the training loop

    def save(self, progress: Progress, *, wait: bool = False) -> Saved | None:
        """Write a checkpoint; returns how the save ended that was still under way, if any.

        Args:
            wait: return only when it is written (the last save of a run).

        Raises:
            CheckpointError: with `wait` or without `asynchronous`, if it cannot be written.
        """
        before = self.wait()
        if self._broken:
            raise CheckpointError("an exchange between the ranks failed during an earlier save: no further one is safe")
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
            while self._thread.is_alive():
                self._thread.join(timeout=1.0)
                self._on_progress()
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
            self._broken = True
            error = CheckpointError(f"cannot write {folder}: {first_line(failure)}")
        seconds = time.perf_counter() - snapshot.started
        self._saved = Saved(folder, seconds, snapshot.stalled, error)

    def _together(self, work: Callable[[], Any], folder: Path) -> list[Any]:
        """`work` on every rank; its results, by rank. Whatever happens in it, every rank takes part in the exchange.

        Raises:
            CheckpointError: on every rank, if it failed on any.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            logger.debug("save failed on this rank", exc_info=True)
            where = (
                f" (rank {self._processes.rank} on {self._processes.host})" if self._processes.world_size > 1 else ""
            )
            failure = f"{first_line(error)}{where}{_remedy(error)}"
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
            if not (partial / file).exists():
                raise OSError(
                    f"{partial / file}, which rank 0 has made, is not here: checkpoint_dir must lie on a file system "
                    "that all machines share, and no other run may write into it"
                )
            with SharedFile(partial / file, snapshot.layouts[file]) as shared:
                for name, piece in content.items():
                    shared.write(name, piece.start, piece.values.cpu())
                    if threading.current_thread() is threading.main_thread():
                        self._on_progress()
        write_text(partial / rank_file(self._processes.rank), json.dumps(snapshot.rank))

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
        if missing := [r for r in range(self._processes.world_size) if not (partial / rank_file(r)).is_file()]:
            raise OSError(f"the files of ranks {missing[:8]} are not there")
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


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, so that the VAE costs no space in each checkpoint; copy where the file system cannot."""
    with suppress(FileNotFoundError):
        target.unlink()
    source = Path(os.path.realpath(source))  # os.link would link a link itself; Hugging Face's caches are made of them
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def rank_file(rank: int) -> str:
    """What a rank saved for itself, below the checkpoint's folder."""
    return f"ranks/{rank:05d}.json"


def _remedy(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Make room there or lower --keep_last_n; earlier checkpoints are untouched"
    if isinstance(error, OSError):
        return ". Earlier checkpoints are untouched; continue with --auto_resume True"
    return ""


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
