"""Pictures and request files for tests, and what is in a folder of results."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLOURS = {"red.png": (220, 40, 40), "blue.png": (40, 60, 220)}


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 48), colour).save(folder / name)


def write_requests(path: Path, *lines: dict | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def results_of(folder: Path) -> list[dict]:
    """Lines of results.jsonl without what differs from run to run."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def contents_of(folder: Path) -> dict[str, bytes]:
    """Pictures and texts by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".txt")}
