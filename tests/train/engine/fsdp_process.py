"""FSDP2 runs of a tiny BAGEL, called on every rank by `tests.train.launch.launch`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from echo4o.model import bagel
from echo4o.train.engine.fsdp import FSDPEngine
from echo4o.train.parallelize import apply_activation_checkpointing
from echo4o.train.processes import Processes
from tests.train.engine import zero_process
from tests.train.engine.zero_process import (
    PACKS,
    _poisoned,
    _same_storage,
    _step,
    adamw,
    fill,
    packs_of_step,
    tiny_model,
    tiny_weights,
)

#: Name → options of the engine, and ``tied``, ``recompute``, ``values``, ``dtype``, ``ce_chunk`` of the run.
SCENARIOS: Mapping[str, dict[str, Any]] = {
    "full": {"strategy": "FULL_SHARD", "recompute": "full", "ce_chunk": 4, "poisoned": True},
    "full_selective": {"strategy": "FULL_SHARD", "recompute": "selective", "backward_prefetch": "NO_PREFETCH"},
    "grad_op": {"strategy": "SHARD_GRAD_OP"},
    "hybrid": {"strategy": "HYBRID_SHARD", "num_replicate": 2, "num_shard": 2, "recompute": "full"},
    "hybrid_zero2": {"strategy": "_HYBRID_SHARD_ZERO2", "num_replicate": 2, "num_shard": 1},
    "none": {"strategy": "NO_SHARD", "recompute": "full"},
    "tied": {"strategy": "FULL_SHARD", "tied": True, "recompute": "full"},
    "values": {"strategy": "FULL_SHARD", "values": True},
    "offload": {"strategy": "FULL_SHARD", "cpu_offload": True, "recompute": "full"},
    "bf16": {"strategy": "FULL_SHARD", "dtype": "bfloat16"},
}
#: With a higher rate ten steps amplify rounding noise beyond any tolerance, in one process as well.
STEPS, LR = 10, 1e-3


def run(argument: dict[str, Any]) -> list[str]:
    """Run the named scenarios one after the other; rank 0 leaves what it found in the folder."""
    processes = Processes.from_environment(timeout=120.0)
    for name in argument["names"]:
        found = scenario(processes, **SCENARIOS[name])
        if processes.rank == 0:
            torch.save(found, Path(argument["folder"]) / f"{name}.pt")
        processes.barrier()
    processes.close()
    return argument["names"]


def scenario(
    processes: Processes,
    *,
    tied: bool = False,
    recompute: str = "none",
    values: bool = False,
    dtype: str = "float32",
    ce_chunk: int = 1024,
    poisoned: bool = False,
    **options: Any,
) -> dict[str, Any]:
    bagel.CE_CHUNK, zero_process.LR = ce_chunk, LR
    weights = tiny_weights(tied)
    mine = range(processes.rank, len(PACKS), processes.world_size)
    engine = FSDPEngine(processes, torch.device("cpu"), getattr(torch, dtype), **options)
    model = tiny_model(tied, weights if values else None)
    apply_activation_checkpointing(model, recompute)
    engine.prepare(model, adamw, None if values else lambda pieces: fill(pieces, weights))
    pieces = engine.trained()
    losses, norms = [], []
    for step in range(STEPS):
        if poisoned and step == 1:
            norms.append(_poisoned(engine, packs_of_step(0), mine))
        loss, norm = _step(engine, packs_of_step(step), mine)
        losses.append(loss)
        norms.append(norm)
    return {
        "losses": losses,
        "norms": norms,
        "weights": engine.full_state_dict(),
        "names": (sorted(engine.trained()), sorted(engine.frozen())),
        "num_owned": engine.gather(sum(p.values.numel() for p in engine.trained().values() if p.owned)),
        "same_storage": all(engine.gather(_same_storage(pieces, engine.trained()))),
        "notes": engine.notes,
        "described": engine.describe(),
    }
