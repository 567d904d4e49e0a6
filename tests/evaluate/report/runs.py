"""Run folders as an evaluation leaves them, without drawing or judging anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from echo4o.evaluate.benchmark import Benchmark, Item, Judgement
from echo4o.evaluate.benchmarks import benchmark as benchmark_called
from echo4o.evaluate.run_folder import RunFolder

JUDGE = "judge-1"
ANSWERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "geneval++": lambda r: {"correct": int(r.random() < 0.6), "reason": "Two of the three cups are red, one is blue."},
    "imagine-bench": lambda r: {
        "fantasy_fulfillment": r.randint(4, 10),
        "identity_preservation": r.randint(5, 10),
        "aesthetic_quality": r.randint(5, 10),
        "reason": "The fur is blue as asked. The shape is kept. Light and composition are convincing.",
    },
    "omnicontext": lambda r: {
        "score": r.randint(3, 10),
        "reasoning": "The person of image 1 is there, but the coat has another cut.",
    },
}


def draw(path: Path, seed: int, side: int = 32) -> Path:
    """A picture of a few coloured shapes."""
    rng = random.Random(seed)
    colour = lambda: tuple(rng.randrange(40, 230) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (side, side), colour())
    canvas = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = rng.randrange(side * 3 // 4), rng.randrange(side * 3 // 4), rng.randrange(side // 8, side // 2)
        (canvas.ellipse if rng.random() < 0.5 else canvas.rectangle)((x, y, x + size, y + size), fill=colour())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_run(
    folder: Path,
    name: str,
    items: Sequence[Item],
    *,
    seed: int = 0,
    judge: str = JUDGE,
    side: int = 32,
    status: Callable[[Item], str] = lambda item: "ok",
    answer: Callable[[Item, str], dict[str, Any] | None] = lambda item, question: None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/name`` with pictures, items, judgements and ``run.json``; returns `folder`.

    Args:
        status: of an item's judgements; ``missing_image`` leaves its picture out, ``not_judged`` its judgements.
        answer: of a question of an item; None draws one.
    """
    benchmark: Benchmark = benchmark_called(name)
    place = folder / name
    (place / "images").mkdir(parents=True)
    rng, lines = random.Random(seed), []
    for number, item in enumerate(items):
        state = status(item)
        for n in range(item.num_images if state != "missing_image" else 0):
            draw(place / "images" / benchmark.image_name(item, n), seed * 1000 + number * 10 + n, side)
        for question in benchmark.questions(item):
            drawn = ANSWERS[name](rng)
            given = (answer(item, question.name) or drawn) if state == "ok" else None
            if state == "not_judged":
                continue
            error = None if state == "ok" else f"{state} after 3 attempts"
            text = json.dumps(given) if given else "I cannot say" if state == "parse_error" else None
            usage = {"prompt_tokens": 900, "completion_tokens": 60}
            judgement = Judgement(
                name, item.id, question.name, state, given, text, error, judge, f"{number}", usage, 1.5, 1
            )  # pyright: ignore[reportArgumentType]
            lines.append(asdict(judgement))
    run = RunFolder(place)
    run.write_items(items)
    run.judgements.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    told = {"benchmark": name, "model": folder.name, "fingerprint": folder.name * 8, "seed": seed, "judge": judge}
    run.note(**(told | (facts or {})))
    return folder


def geneval_items(count: int) -> list[Item]:
    tags = ("color_attr", "counting", "size_spatial_attr")
    include = [{"class": "cup", "count": 3, "color": "red"}]
    return [
        Item(str(i), f"A photo of three red cups, number {i}", (), tags[i % 3], {"include": include, "exclude": []})
        for i in range(1, count + 1)
    ]


def imagine_items(count: int) -> list[Item]:
    tags = ("Attribute shift", "Hybridization", "Spatiotemporal", "Multi-Object")
    return [
        Item(
            str(i),
            f"A monkey with blue fur, number {i}",
            (),
            tags[i % 4],
            {"note": "The fur is blue.", "type": "COLOR"},
        )
        for i in range(1, count + 1)
    ]


def omnicontext_items(count: int, references: Path, side: int = 32) -> list[Item]:
    tags = benchmark_called("omnicontext").tags
    items = []
    for i in range(1, count + 1):
        files = tuple(draw(references / f"{i}_{n}.png", 7000 + i * 10 + n, side) for n in range(1 + i % 3))
        prompt = f"The person of image 1 in the room of image {len(files)}."
        items.append(Item(f"key{i}", prompt, files, tags[i % 8], {"key": f"key{i}"}))
    return items
