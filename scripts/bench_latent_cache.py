"""Time training with and without a latent cache: `python scripts/bench_latent_cache.py --json cache.json`

Caches the data of a run, then trains it in three ways in turn, each time in a process of its own (peak memory is the
process'), and reports medians over the runs and the size of the cache on disk beside what was foretold:

plain      every image is decoded and encoded
latents    VAE moments come from the cache; references are still decoded for the vision encoder
all        outputs of the frozen vision encoder too: no image is decoded

The vision encoder is frozen in all three. Times leave out the first `--skip` steps. On the tiny example model the ratio
says little about a 7B model, whose step is dominated by its decoder: give its config with --config on its own machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from echo4o.train.metrics import read_metrics

PROGRAMS = ("plain", "latents", "all")
FIELDS = ("seconds_per_step", "samples_per_sec", "data_wait_share", "peak_memory_gb")


def settings(args: argparse.Namespace, out: Path) -> list[str]:
    """Settings of every run beside the config."""
    values = {
        "freeze_vit": True, "results_dir": out, "checkpoint_dir": out / "checkpoints", "total_steps": args.steps,
        "warmup_steps": 1, "save_every": 10**9, "log_every": 1, "tensorboard": False, "num_workers": args.workers,
        "peak_device_tflops": 1, "auto_resume": False,
    }  # fmt: skip
    return [args.config, *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def make_caches(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """The caches of the two programs that use one; what each holds and takes."""
    from echo4o.config import load_config
    from echo4o.train.latent_cache import run

    sizes = {}
    for name in ("latents", "all"):
        cache = folder / name
        made = run(load_config(settings(args, folder / "unused")), cache, vit=name == "all", dtype=args.dtype)
        shards = sum(path.stat().st_size for path in cache.rglob("shards/*"))
        every = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        sizes[name] = {
            "images": made.num_images, "foretold_bytes": made.num_bytes, "shard_bytes": shards, "folder_bytes": every,
            "images_per_second": made.num_encoded / made.seconds,
        }  # fmt: skip
    return sizes


def measure(args: argparse.Namespace, program: str, caches: Path, out: Path) -> dict[str, float]:
    """One training in a process of its own."""
    words = settings(args, out)
    if program != "plain":
        words += ["--latent_cache", str(caches / program), "--latent_cache_strict", "True"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(
        [sys.executable, "-m", "echo4o.cli", "train", *words], env=environment, check=True, capture_output=True
    )
    records = read_metrics(out / "metrics.jsonl")[args.skip :]
    found = {name: statistics.fmean(record[name] for record in records) for name in FIELDS}
    return found | {"loss": records[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny_cpu.yaml", help="settings of the run")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0 shows all the work of a step")
    parser.add_argument("--threads", type=int, default=1, help="of a training process")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="stored in the cache")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_caches(args, folder / "caches")
        runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
        for number in range(args.runs):
            for program in PROGRAMS:
                runs[program].append(measure(args, program, folder / "caches", folder / f"{program}_{number}"))
    medians = {
        program: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for program, found in runs.items()
    }
    print(f"{'':10}{'s/step':>10}{'ratio':>8}{'samples/s':>11}{'data':>7}{'peak GB':>9}   last loss")
    for program, found in medians.items():
        ratio = medians["plain"]["seconds_per_step"] / found["seconds_per_step"]
        print(
            f"{program:10}{found['seconds_per_step']:10.4f}{ratio:8.2f}{found['samples_per_sec']:11.2f}"
            f"{found['data_wait_share']:7.0%}{found['peak_memory_gb']:9.2f}   {found['loss']!r}"
        )
    for program, size in sizes.items():
        print(
            f"cache {program}: {size['images']:,} images, foretold {size['foretold_bytes']:,} bytes, shards "
            f"{size['shard_bytes']:,}, folder {size['folder_bytes']:,}; {size['images_per_second']:.1f} images/s"
        )
    if args.json:
        args.json.write_text(json.dumps({"medians": medians, "runs": runs, "caches": sizes}, indent=2))


if __name__ == "__main__":
    main()
