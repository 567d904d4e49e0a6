"""Judgements and data for the tests of benchmarks."""

import json
from pathlib import Path

from PIL import Image

from echo4o.evaluate.benchmark import Judgement


def judged(name: str, answer: dict | None = None, status: str = "ok") -> dict[str, Judgement]:
    return {name: Judgement("b", "i", name, status, answer)}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def picture(path: Path, size=(32, 24), color=(200, 30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def text_of(question) -> str:
    return "\n".join([question.system, *(part for part in question.parts if isinstance(part, str))])
