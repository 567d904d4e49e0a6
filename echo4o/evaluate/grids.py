"""The 2 × 2 sheets that DPG-Bench's own scorer reads, made of a run's pictures."""

from __future__ import annotations

from pathlib import Path

from echo4o.evaluate.benchmark import BenchmarkDataError
from echo4o.evaluate.benchmarks import benchmark as benchmark_called
from echo4o.evaluate.benchmarks.dpg import write_grid
from echo4o.evaluate.run_folder import RunFolder


def write_grids(name: str, out: Path, data: Path | None, grids: Path) -> str:
    """Write ``{grids}/{item}.png`` for every item whose pictures are all there; returns how many in words.

    Raises:
        BenchmarkDataError: for another benchmark than ``dpg``.
        OSError: if `grids` cannot be written.
    """
    if name != "dpg":
        raise BenchmarkDataError(f"--grids is for dpg, whose scorer reads sheets; leave it out for {name}")
    benchmark, run = benchmark_called(name), RunFolder(out / name)
    grids.mkdir(parents=True, exist_ok=True)
    written, incomplete = 0, 0
    for item in benchmark.load(data):
        pictures = run.pictures(benchmark, item)
        found = [picture for picture in pictures if picture is not None]
        if len(found) < len(pictures):
            incomplete += 1
            continue
        write_grid(found, grids / f"{item.id}.png")
        written += 1
    return f"{written} sheets in {grids}" + (f", {incomplete} items lack pictures" if incomplete else "")
