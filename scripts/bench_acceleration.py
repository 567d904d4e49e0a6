"""What each way of drawing faster saves, and what it costs in quality.

    python scripts/bench_acceleration.py --model data_examples/tiny_bagel            # on held-out rows with targets
    python scripts/bench_acceleration.py --model data_examples/tiny_bagel --rows 16 --runs 3

For every variant: network evaluations (a forward pass of one branch counts one), seconds a picture, the mean absolute
difference to the exact pictures and to the rows' targets (0 … 255). Fewer steps stand beside the accelerations: what
they save must be judged against simply stepping less often.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from make_example_data import heldout_rows
from PIL import Image
from prove_learning import SETTINGS, errors

from echo4o.generate.context import Reader
from echo4o.generate.pipeline import Echo4oPipeline

VARIANTS = {
    "exact, 50 points": {},
    "branch_cache 2": {"branch_cache": 2},
    "branch_cache 4": {"branch_cache": 4},
    "taylorseer": {"taylorseer": True},
    "taylorseer, branch_cache 2": {"taylorseer": True, "branch_cache": 2},
    "25 points": {"num_timesteps": 25},
    "20 points": {"num_timesteps": 20},
    "12 points": {"num_timesteps": 12},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    pipe = Echo4oPipeline.from_pretrained(arguments.model, dtype="float32")
    compiled = Echo4oPipeline.from_pretrained(arguments.model, dtype="float32", compile=True)
    rows = heldout_rows()[: arguments.rows]
    evaluations = 0
    features = Reader.features

    def counted(self, layout, *rest):
        nonlocal evaluations
        evaluations += len(layout.pieces)
        return features(self, layout, *rest)

    Reader.features = counted

    def draw(variant: dict, pipe: Echo4oPipeline) -> tuple[list[np.ndarray], float, int]:
        nonlocal evaluations
        evaluations, start, pictures = 0, time.perf_counter(), []
        settings = {**SETTINGS, "num_timesteps": 50, **variant}
        for seed, row in enumerate(rows):
            images = [Image.fromarray(pixels) for pixels in row.images()[:-1]]
            width, height = row.target[1]
            out = pipe(row.instruction, images, seed=seed, height=height, width=width, **settings)
            pictures.append(np.asarray(out.images[0]))
        return pictures, (time.perf_counter() - start) / len(rows), evaluations // len(rows)

    jobs = {name: (variant, pipe) for name, variant in VARIANTS.items()} | {"exact, compiled": ({}, compiled)}
    draw({}, compiled)
    results = {name: [] for name in jobs}
    for _ in range(arguments.runs):
        for name, job in jobs.items():
            results[name].append(draw(*job))
    exact = results["exact, 50 points"]
    print(f"{len(rows)} rows, median of {arguments.runs} interleaved runs")
    print("| variant | evaluations | s a picture | faster | differs from exact | error to target |")
    print("|---|---|---|---|---|---|")
    for name, runs in results.items():
        pictures, _, count = runs[0]
        seconds = statistics.median(run[1] for run in runs)
        faster = statistics.median(e[1] / run[1] for e, run in zip(exact, runs, strict=True))
        pairs = zip(pictures, exact[0][0], strict=True)
        apart = np.mean([np.abs(a.astype(float) - b.astype(float)).mean() for a, b in pairs])
        print(
            f"| {name} | {count} | {seconds:.2f} | {faster:.2f}× | {apart:.2f} | {errors(pictures, rows).mean():.2f} |"
        )


if __name__ == "__main__":
    main()
