"""Saves on several ranks of which one fails, called by `tests.train.launch.launch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint import folders, writer
from echo4o.checkpoint.slices import WeightsReader
from echo4o.checkpoint.writer import CheckpointWriter, Progress
from echo4o.train.ema import EMA
from echo4o.train.engine.fsdp import FSDPEngine
from echo4o.train.processes import Processes
from tests.train.engine.zero_process import adamw, fill, tiny_model, tiny_weights


def run(folder: str) -> dict[str, Any]:
    """Save twice; in the first save something unforeseen happens on one rank, in the second rank 1 is slow."""
    processes = Processes.from_environment(timeout=60.0)
    engine = FSDPEngine(processes, torch.device("cpu"), torch.float32)
    weights = tiny_weights()
    engine.prepare(tiny_model(False, None), adamw, lambda pieces: fill(pieces, weights))
    ema = EMA(engine.trained(), 0.5)
    calls = []

    def assets(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise TypeError("unforeseen")

    saver = CheckpointWriter(folder, engine, ema, assets)
    saver.save(Progress(1, {}, {}))
    first = saver.wait()
    write = writer.CheckpointWriter._write_own

    def write_late(self: CheckpointWriter, *arguments: Any) -> None:
        time.sleep(1.0 if processes.rank else 0.0)
        write(self, *arguments)

    writer.CheckpointWriter._write_own = write_late
    saver.save(Progress(2, {}, {}))
    second = saver.wait()
    assert first is not None and second is not None
    reader = WeightsReader(Path(folder) / "0000002" / "model.trained.safetensors")
    whole = engine.full_state_dict()
    same = [torch.equal(reader.run(n, 0, t.numel()), t.reshape(-1)) for n, t in whole.items() if n in reader]
    processes.barrier()
    processes.close()
    return {
        "first": str(first.error),
        "second": str(second.error),
        "steps": folders.steps(folder),
        "num_same": sum(same),
        "num_tensors": len(same),
    }
