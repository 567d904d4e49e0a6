"""A short run that is evaluated on the way, in one process or on several ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

from echo4o.config import load_config
from tests.train.tiny_run import DATA, run_settings

IMAGES = DATA / "multi_ref_native" / "images"
REQUESTS = (
    {"id": "two", "prompt": "Fill image 1 with image 2.", "images": [f"{IMAGES}/000_1.png", f"{IMAGES}/000_2.png"]},
    {"id": "text", "prompt": "A red square.", "height": 32, "width": 32, "num_images": 2},
)


def write_requests(path: Path, *more: dict) -> Path:
    lines = [{"num_timesteps": 3, "size_from": "first", **request} for request in (*REQUESTS, *more)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluated(bagel: Path, out: Path, **changes: object) -> dict:
    """Settings: two packs a step, validation rows of every kind, pictures."""
    return run_settings(bagel, out, **{
        "eval_every": 2,
        "validation_config_file": str(DATA / "dataset_mixed.yaml"),
        "validation_rows": 2,
        "total_steps": 3,
        "save_every": 3,
        "ema": 0.9,
        **changes,
    })  # fmt: skip


def trainings(runs: list[tuple[int, dict]]) -> None:
    """Whole runs with pictures, one after the other; called on each rank."""
    from echo4o.cli.training import sampler_of
    from echo4o.train.trainer import train

    for port, settings in runs:
        os.environ["MASTER_PORT"] = str(port)
        config = load_config((), settings)
        train(config, sampler_of(config))
