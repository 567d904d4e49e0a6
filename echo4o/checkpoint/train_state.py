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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.checkpoint.folders import FORMAT, CheckpointError, faults
from echo4o.checkpoint.inventory import ADAPTER, FROZEN, OPTIMIZER, TRAINED, TRAINING, WHOLE
from echo4o.checkpoint.names import ADAPTER_PREFIX
from echo4o.checkpoint.pieces import Piece
from echo4o.checkpoint.rng import set_rng_state
from echo4o.checkpoint.slices import WeightsReader
from echo4o.checkpoint.writer import first_line, rank_file

if TYPE_CHECKING:
    from echo4o.train.ema import EMA
    from echo4o.train.engine import Engine


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
    path = Path(folder) / rank_file(rank)
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
        raise CheckpointError(f"{folder} cannot be resumed: {first_line(error)}") from error
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
