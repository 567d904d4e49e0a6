"""A GenEval++ of a few prompts written here, with pictures, for tests of the judging engine."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from echo4o.evaluate.client import JudgeOptions
from echo4o.evaluate.command import Evaluation
from tests.evaluate.judge_server import JudgeServer

TAGS = ("color_attr", "counting", "size_spatial_attr")
MODEL = "test-judge-2026-01-01"


def write_prompts(path: Path, count: int) -> Path:
    lines = []
    for number in range(count):
        include = [{"class": "kite", "count": number % 3 + 1, "color": "red"}]
        row = {"tag": TAGS[number % len(TAGS)], "include": include, "prompt": f"A photo of kite number {number}."}
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_images(folder: Path, count: int, suffix: str = ".png") -> Path:
    """One picture a prompt, under upstream's names; each of another colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        Image.new("RGB", (32, 24), colour).save(folder / f"{number + 1}{suffix}")
    return folder


def evaluation(folder: Path, server: JudgeServer | None, count: int = 6, **changed: object) -> Evaluation:
    """Of `count` prompts whose pictures lie in ``folder/made``; made if they are not there."""
    prompts, images = folder / "prompts.jsonl", folder / "made"
    if not prompts.is_file():
        write_prompts(prompts, count)
    if not images.is_dir():
        write_images(images, count)
    judge = changed.pop("judge", None)
    if server is not None:
        how = {"backoff": 0.01, "timeout": 10.0, **(judge or {})}  # type: ignore[dict-item]
        judge = JudgeOptions(how.pop("model", MODEL), server.url, **how)
    values = {
        "benchmark": "geneval++", "out": folder / "run", "prompts": prompts, "images": images, "judge": judge,
        "report": False, **changed,
    }  # fmt: skip
    return Evaluation(**values)  # type: ignore[arg-type]


def lines_of(folder: Path) -> list[dict]:
    """``judgements.jsonl`` of the run."""
    text = (folder / "run" / "geneval++" / "judgements.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def scores_of(folder: Path) -> dict:
    """``scores.json`` of the run, without what may differ."""
    content = json.loads((folder / "run" / "geneval++" / "scores.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("date", "usage", "cost")}
