"""Training checkpoints ``{checkpoint_dir}/{step:07d}/``: complete or absent, and everything a run needs to go on.

::

    0000100/
      complete                 marker, written last: the size of every other file
      training/                torch.distributed.checkpoint: what trains, its EMA, the optimiser
      training.json            step, EMA updates, running loss means, world size
      ranks/00000.json         random generators and data stream of each rank
      config.yaml              the run's settings
      model.safetensors        upstream's names, everything included
      ema.safetensors
      llm_config.json …        what generation needs: configs, tokenizer, ae.safetensors

A checkpoint is written under a temporary name, synced and renamed; a killed save leaves the previous one usable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from echo4o.checkpoint.rng import rng_state, set_rng_state
from echo4o.checkpoint.weights import non_finite, write_text, write_weights

if TYPE_CHECKING:
    from echo4o.train.ema import EMA
    from echo4o.train.engine import Engine

logger = logging.getLogger(__name__)

MARKER = "complete"
FORMAT = 1
_STEP_NAME = re.compile(r"\d{7,}")
_REMAINS = re.compile(r"\d{7,}\.(partial|replaced)")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message names the fix."""


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


def step_folder(checkpoint_dir: str | Path, step: int) -> Path:
    return Path(checkpoint_dir) / f"{step:07d}"


# ---------------------------------------------------------------- save


def save(
    checkpoint_dir: str | Path,
    progress: Progress,
    engine: Engine,
    ema: EMA,
    write_assets: Callable[[Path], None],
    keep_last_n: int = 0,
) -> Path:
    """Write one checkpoint; older ones beyond `keep_last_n` (0: keep all) are removed afterwards.

    Args:
        write_assets: writes configs, tokenizer and VAE into the folder it is given (called on rank 0).

    Raises:
        CheckpointError: if anything fails; earlier checkpoints are untouched then.
    """
    folder = step_folder(checkpoint_dir, progress.step)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "ranks").mkdir(parents=True)
        engine.barrier()
        _require_finite(engine, ema)
        _write(partial, progress, engine, ema, write_assets)
        engine.barrier()
        if engine.rank == 0:
            _publish(partial, folder, progress.step)
    # Full disks surface as OSError, as torch's RuntimeError or, a BaseException, as CheckpointException.
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {_reason(error)}") from error
    if engine.rank == 0:
        prune(checkpoint_dir, keep_last_n)
    engine.barrier()
    return folder


def _write(partial: Path, progress: Progress, engine: Engine, ema: EMA, write_assets: Callable[[Path], None]) -> None:
    state = engine.state() | {"ema": ema.shadow}
    with _without_process_group_warning():
        dcp_save(state, checkpoint_id=partial / "training", no_dist=engine.world_size == 1)
    rank_state = progress.rank | {"rng": rng_state()}
    write_text(partial / "ranks" / f"{engine.rank:05d}.json", json.dumps(rank_state))
    whole = engine.full_state_dict()
    averages = engine.consolidate(ema.shadow)
    if engine.rank:
        return
    trainer = {
        "format": FORMAT,
        "step": progress.step,
        "world_size": engine.world_size,
        "ema_num_updates": ema.num_updates,
        **progress.trainer,
    }
    write_text(partial / "training.json", json.dumps(trainer))
    write_weights(whole, partial, "model")
    tied = tied_names(engine.module)
    write_weights({name: averages.get(tied.get(name, name), whole[name]) for name in whole}, partial, "ema")
    write_assets(partial)


def _require_finite(engine: Engine, ema: EMA) -> None:
    """A checkpoint whose weights are not numbers would be taken for the newest good one."""
    named = {**engine.state()["model"], **{f"{name} (EMA)": tensor for name, tensor in ema.shadow.items()}}
    bad = next(iter(non_finite(named)), None)
    if found := next((name for name in engine.gather(bad) if name is not None), None):
        raise ValueError(
            f"{found} holds numbers that are not finite. Resume from an earlier checkpoint with a lower --lr"
        )


@contextlib.contextmanager
def _without_process_group_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _publish(partial: Path, folder: Path, step: int) -> None:
    if unusable := _unusable_entries(partial):
        raise OSError(f"{unusable[0]} is neither a file nor a folder (a dangling link?)")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    write_text(partial / MARKER, json.dumps({"format": FORMAT, "step": step, "files": sizes}, indent=1))
    for path in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(path)
    replaced = folder.with_name(f"{folder.name}.replaced")
    restore_replaced(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further name → first name of parameters that bear several."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


# ---------------------------------------------------------------- find and clean up


def is_complete(folder: str | Path) -> bool:
    return not faults(folder)


def faults(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint folder; empty if it is complete."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} does not exist"]
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, size in marker["files"].items()}
    except FileNotFoundError:
        return [
            f"{folder} has no {MARKER} marker: its save was interrupted, or it is not one of our training checkpoints"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MARKER} is unreadable ({error})"]
    found = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    return found + [f"{name} is a dangling link" for name in _unusable_entries(folder) if name not in sizes]


def _unusable_entries(folder: Path) -> list[str]:
    """Names below `folder` that are neither files nor folders, links followed."""
    entries = sorted(folder.rglob("*"))
    return [str(path.relative_to(folder)) for path in entries if not path.is_file() and not path.is_dir()]


def restore_replaced(checkpoint_dir: str | Path) -> None:
    """Give back its name to a checkpoint whose replacement was killed between moving it away and taking its place."""
    for path in Path(checkpoint_dir).glob("*.replaced"):
        target = path.with_suffix("")
        if _REMAINS.fullmatch(path.name) and not target.exists():
            os.rename(path, target)
            logger.warning("%s: its replacement was interrupted; the checkpoint is back under its name", target)


def steps(checkpoint_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; other names and incomplete folders are passed over."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name)]
    return sorted(int(path.name) for path in named if is_complete(path))


def latest(checkpoint_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None. Newer ones that are incomplete are named in a warning."""
    restore_replaced(checkpoint_dir)
    found = steps(checkpoint_dir)
    for path in sorted(Path(checkpoint_dir).glob("[0-9]*")):
        if _STEP_NAME.fullmatch(path.name) and path.is_dir() and int(path.name) > max(found, default=-1):
            logger.warning("%s is passed over: %s", path, "; ".join(faults(path)[:3]))
    return step_folder(checkpoint_dir, found[-1]) if found else None


def prune(checkpoint_dir: str | Path, keep_last_n: int) -> None:
    """Remove all but the newest `keep_last_n` complete checkpoints (0: remove none), and remains of killed saves."""
    restore_replaced(checkpoint_dir)
    for path in Path(checkpoint_dir).iterdir():
        if _REMAINS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for step in steps(checkpoint_dir)[:-keep_last_n] if keep_last_n > 0 else []:
        folder = step_folder(checkpoint_dir, step)
        try:
            # Without its marker a half-removed folder is nobody's latest.
            (folder / MARKER).unlink()
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", folder, error)


def set_aside_later(checkpoint_dir: str | Path, step: int) -> Path | None:
    """Move checkpoints beyond `step` into ``earlier_run_N``, so that a run starting there cannot be confused with them.

    Returns:
        The folder they are in now, None if there were none.
    """
    checkpoint_dir = Path(checkpoint_dir)
    later = [step_folder(checkpoint_dir, other) for other in steps(checkpoint_dir) if other > step]
    if not later:
        return None
    number = next(n for n in range(1, 1_000_000) if not (checkpoint_dir / f"earlier_run_{n}").exists())
    target = checkpoint_dir / f"earlier_run_{number}"
    target.mkdir()
    for folder in later:
        os.rename(folder, target / folder.name)
    return target


# ---------------------------------------------------------------- load


def load(folder: str | Path, engine: Engine, ema: EMA) -> Progress:
    """Continue exactly: fills the engine's model and optimiser and the EMA, and sets the random generators.

    Frozen weights are not part of the training state: build the model from the folder's ``model.safetensors`` first.

    Raises:
        CheckpointError: if files are missing or damaged, or the checkpoint trains something else.
    """
    folder = Path(folder)
    if wrong := faults(folder):
        raise CheckpointError(
            f"{folder} cannot be resumed: {'; '.join(wrong[:3])}. Take an earlier one, or start from its weights "
            "alone: --init_from with another --checkpoint_dir."
        )
    trainer = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if trainer["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {trainer['format']}, this version reads {FORMAT}")
    reader = FileSystemReader(folder / "training")
    keys = set(reader.read_metadata().state_dict_metadata)
    state = engine.empty_state(keys) | {"ema": ema.shadow}
    _check_same_parameters(keys, state["model"], folder)
    with _without_process_group_warning():
        dcp_load(state, storage_reader=reader, no_dist=engine.world_size == 1)
    engine.load_state(state)
    ema.num_updates = int(trainer["ema_num_updates"])
    rank = json.loads(rank_file(folder, engine.rank).read_text(encoding="utf-8"))
    set_rng_state(rank.pop("rng"))
    return Progress(step=int(trainer["step"]), trainer=trainer, rank=rank)


def rank_file(folder: Path, rank: int) -> Path:
    path = folder / "ranks" / f"{rank:05d}.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} was written by fewer ranks than {rank + 1}: no {path.name} in its ranks folder"
        )
    return path


def _check_same_parameters(keys: set[str], model: Mapping[str, Any], folder: Path) -> None:
    saved = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    if missing := sorted(set(model) - saved):
        raise CheckpointError(
            f"{folder} did not train {len(missing)} parameters that now do, e.g. {missing[0]}: resume with the freeze "
            "flags of its config.yaml, or start anew from its weights: --init_from with another --checkpoint_dir"
        )
    if extra := sorted(saved - set(model)):
        raise CheckpointError(
            f"{folder} trained {len(extra)} parameters that are now frozen, e.g. {extra[0]}: resume with the freeze "
            "flags of its config.yaml, or start anew from its weights: --init_from with another --checkpoint_dir"
        )


# ---------------------------------------------------------------- files


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, so that the VAE costs no space in each checkpoint; copy where the file system cannot."""
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    source = Path(os.path.realpath(source))  # os.link would link a link itself; Hugging Face's caches are made of them
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
