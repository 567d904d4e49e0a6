"""python scripts/soak.py --steps 200 --ranks 2

Does memory grow? A small BAGEL trains on several processes of this machine (FSDP2 FULL_SHARD; ``--engine deepspeed``)
with fused AdamW, an average, and checkpoints saved in the background. The anonymous resident memory of every rank
(RssAnon of the operating system) is sampled after each step. The exit status is 1 if it grows by more than 2 % and more
than 8 MB after the first quarter of the run (50 of 200 steps), when all buffers exist.

Two things grow at first and end, and are kept out: packs differ in length, so that freed blocks of memory do not fit
the next ones at once (malloc gives them back before each sample; ``--untrimmed`` shows what the system sees), and
oneDNN keeps compiled kernels for the latest 1024 shapes of matrices (32 here).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENTRY = "scripts.soak:train_and_sample"
MB = 1e6
PRINT_EVERY = 20
#: Samples of which the median counts, at both ends.
WINDOW = 10
NUM_KEPT_KERNELS = 32
ALLOWED_SHARE, ALLOWED_MB = 0.02, 8.0


def write_model(folder: Path, hidden: int, layers: int) -> float:
    """The tests' BAGEL, larger; returns the megabytes of its float32 weights."""
    import dataclasses

    from tests.train.tiny_run import tiny_config, write_bagel

    tiny = tiny_config()
    llm = dataclasses.replace(tiny.llm, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers)
    write_bagel(folder, dataclasses.replace(tiny, llm=llm))
    return (folder / "model.safetensors").stat().st_size / MB


def settings_of(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    from tests.train.tiny_run import DATA, run_settings

    return run_settings(
        folder / "bagel",
        folder / "run",
        dataset_config_file=str(DATA / "dataset_mixed.yaml"),
        total_steps=options.steps,
        save_every=options.save_every,
        keep_last_n=2,
        engine=options.engine,
        sharding_strategy="FULL_SHARD",
        lr=1e-4,
    )


def resident_memory() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def give_back_freed_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def train_and_sample(argument: dict[str, Any]) -> list[int]:
    """What each rank does: train; its memory after every step."""
    from echo4o.config import load_config
    from echo4o.train import trainer

    samples: list[int] = []

    class Sampled(trainer.Trainer):
        def count(self, result, micro_batches) -> None:
            super().count(result, micro_batches)
            if argument["trim"]:
                give_back_freed_memory()
            samples.append(resident_memory())

    trainer.Trainer = Sampled
    trainer.train(load_config((), argument["settings"]))
    return samples


def growth_per_step(samples: list[int]) -> float:
    """Bytes a step: the slope of a straight line through the second half, by least squares."""
    half = samples[len(samples) // 2 :]
    return statistics.linear_regression(range(len(half)), half).slope


def print_table(by_rank: list[list[int]]) -> None:
    print(f"{'step':>6}" + "".join(f"{f'rank {rank}':>12}" for rank in range(len(by_rank))) + "   RssAnon, MB")
    for step in range(PRINT_EVERY, len(by_rank[0]) + 1, PRINT_EVERY):
        print(f"{step:6d}" + "".join(f"{samples[step - 1] / MB:12.1f}" for samples in by_rank))


def judge(rank: int, samples: list[int]) -> bool:
    """Print a line; False if the rank's memory grows."""
    settled = len(samples) // 4
    before, after = (statistics.median(part) / MB for part in (samples[settled:][:WINDOW], samples[-WINDOW:]))
    allowed = max(ALLOWED_SHARE * before, ALLOWED_MB)
    print(
        f"rank {rank}: {before:.1f} MB at step {settled}, {after:.1f} MB at step {len(samples)}, "
        f"{after - before:+.1f} MB (allowed {allowed:.1f}); "
        f"{growth_per_step(samples) / 1e3:+.1f} kB a step over the second half"
    )
    return after - before <= allowed


def main() -> None:
    from tests.train.launch import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", default="fsdp", choices=("fsdp", "deepspeed"))
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--untrimmed", action="store_true", help="with freed memory that malloc has not given back")
    options = parser.parse_args()
    if options.steps < 4 * WINDOW:
        parser.error(f"--steps must be at least {4 * WINDOW}")
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(NUM_KEPT_KERNELS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_model(folder / "bagel", options.hidden, options.layers)
        print(
            f"{size:.1f} MB of weights, {options.ranks} ranks, {options.engine}, saves every {options.save_every} steps"
        )
        argument = {"settings": settings_of(folder, options), "trim": not options.untrimmed}
        started = time.perf_counter()
        by_rank = launch(options.ranks, ENTRY, argument, timeout=3600)
        print(f"{options.steps} steps in {time.perf_counter() - started:.0f} s, start-up included")
    print_table(by_rank)
    sys.exit(not all([judge(rank, samples) for rank, samples in enumerate(by_rank)]))


if __name__ == "__main__":
    main()
