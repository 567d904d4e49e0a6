"""A run of a dozen small rows and its cache, also as a process that can be killed."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from echo4o.config import load_config
from echo4o.data.latent_index import SHARDS
from echo4o.train.caching import work
from echo4o.train.latent_cache import Cached, run
from tests.train.tiny_run import run_settings, write_bagel

TRANSFORMS = {
    "image_transform_args": {"image_stride": 16, "max_image_size": 64, "min_image_size": 32},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 28, "min_image_size": 14},
}


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    side = (40, 56, 64)[number % 3]
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (48, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder: Path, num_rows: int = 12, **changes: Any) -> dict[str, Any]:
    """Settings of a run on `num_rows` rows of two references and a target; every row shares its first reference with
    the row before, so that there are 2 · num_rows + 1 distinct images. A second group edits the same images."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines, edits = [], []
    for row in range(num_rows):
        names = [f"{row}.png", f"{row + 1}.png", f"target_{row}.png"]
        for name, number in zip(names, (row, row + 1, 1000 + row), strict=True):
            (data / name).write_bytes(picture(number))
        images = {"input_images": names[:2], "output_image": names[2]}
        lines.append(json.dumps({"instruction": "put them", **images}))
        edits.append(json.dumps({"instruction": [["first"], ["then"]], **images}))
    (data / "rows.jsonl").write_text("\n".join(lines))
    (data / "edits.jsonl").write_text("\n".join(edits))
    config = {
        "dataset_info": {
            "multi_ref": {"rows": {"jsonl_path": "data/rows.jsonl"}},
            "unified_edit": {"edits": {"jsonl_path": "data/edits.jsonl"}},
        },
        "multi_ref": {"dataset_names": ["rows"], "weight": 2, "noise_copies": 2, **TRANSFORMS},
        "unified_edit": {"dataset_names": ["edits"], "weight": 1, **TRANSFORMS},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(config))
    bagel = folder / "bagel"
    if not bagel.exists():
        write_bagel(bagel)
    return run_settings(bagel, folder / "run", dataset_config_file=str(folder / "dataset.yaml"), **changes)


def cache(settings: dict[str, Any], out: Path, **options: Any) -> tuple[Cached, list[str]]:
    """Run the cache; what it came to, and what it said."""
    said: list[str] = []
    options = {"images_per_shard": 4, **options}
    return run(load_config((), settings), out, say=said.append, **options), said


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but hidden ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cache_on_rank(argument: dict[str, Any]) -> int:
    """For `tests.train.launch.launch`."""
    result, _ = cache(argument["settings"], Path(argument["out"]), **argument.get("options", {}))
    return result.num_encoded


def main() -> None:
    argument = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if (place := argument.get("die")) is not None:
        die_at(**place)
    cache_on_rank(argument)


def die_at(event: str, count: int) -> None:
    """Kill this process in the `count`-th call of a step of the work, half-way through it."""
    original, calls = getattr(work, event), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] < count:
            return original(*args, **kwargs)
        if event == "save_file":
            original(*args, **kwargs)
            path = Path(args[1])
            path.write_bytes(path.read_bytes()[:-100])
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(work, event, dying)


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "vae" / SHARDS).iterdir())


if __name__ == "__main__":
    main()
