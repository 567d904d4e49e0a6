"""Which rows each step trained on: ``{results_dir}/rows/rank_00000.jsonl``, a line a step (``--log_rows True``)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from echo4o.packed import PackedBatch

FOLDER = "rows"


class RowLog:
    """Append the addresses ``[source, epoch, row]`` of every step's samples.

    Args:
        folder: the run's ``results_dir``.
        rank: of this process; each writes a file of its own.
        resume_step: lines beyond it, of any rank, belong to steps that are taken again, and go.

    Raises:
        OSError: if the folder is not writable.
    """

    def __init__(self, folder: str | Path, rank: int, resume_step: int = 0) -> None:
        self._path = Path(folder) / FOLDER / f"rank_{rank:05d}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for path in self._path.parent.glob("rank_*.jsonl"):
                _cut(path, resume_step)
        self._file = None

    def write(self, step: int, batches: Sequence[PackedBatch]) -> None:
        if self._file is None:
            # Opened with the first step: by then rank 0 has cut the files of all ranks.
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        rows = [[list(address) for address in batch.sample_addresses] for batch in batches]
        self._file.write(json.dumps({"step": step, "packs": rows}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(folder: str | Path) -> dict[int, list[list[list]]]:
    """Step → packs of all ranks (each a list of addresses); lines cut off by a kill are left out."""
    steps: dict[int, list[list[list]]] = {}
    for path in sorted((Path(folder) / FOLDER).glob("rank_*.jsonl")):
        for record in _records(path):
            steps.setdefault(record["step"], []).extend(record["packs"])
    return dict(sorted(steps.items()))


def _records(path: Path) -> list[dict]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by a kill, so the step was not saved
            continue
    return records


def _cut(path: Path, step: int) -> None:
    kept = [json.dumps(record) for record in _records(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
