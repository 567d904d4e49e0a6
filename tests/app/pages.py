"""A tiny model for the page, two references, and the values of a tab's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from echo4o.app.parameters import LAST, preset_values
from echo4o.generate.pipeline import Echo4oPipeline
from tests.train.tiny_run import write_bagel


def tiny_pipe(folder: Path) -> Echo4oPipeline:
    return Echo4oPipeline.from_pretrained(write_bagel(folder), dtype="float32", device="cpu")


def write_references(folder: Path) -> list[str]:
    """A red disc, 64 × 64, and a green square, 96 × 64 (width × height)."""
    paths = []
    for name, size, shape, colour in (
        ("disc.png", (64, 64), "ellipse", (200, 40, 40)),
        ("square.png", (96, 64), "rectangle", (40, 160, 80)),
    ):
        image = Image.new("RGB", size, (240, 235, 220))
        getattr(ImageDraw.Draw(image), shape)((12, 12, 50, 50), fill=colour)
        image.save(folder / name)
        paths.append(str(folder / name))
    return paths


def values_of(task: str, **changes: Any) -> dict[str, Any]:
    """As the controls of a fresh tab give them, four time points instead of fifty."""
    common = {"seed": 0, "random_seed": False, "size": "1:1" if task == "t2i" else LAST, "width": 64, "height": 64}
    return {**common, "num_images": 1, "think": False, **preset_values(task), "num_timesteps": 4, **changes}
