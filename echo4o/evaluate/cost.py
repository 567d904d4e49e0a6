"""What judging takes, beforehand by counting and afterwards by what the server says; prices are the caller's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from echo4o.evaluate.benchmark import JudgeImage, Judgement
from echo4o.evaluate.questions import Task, prepared_size

#: English text, about; a server's own tokenizer decides.
CHARACTERS_PER_TOKEN = 4
#: Of a message: role and marks around it.
TOKENS_PER_MESSAGE = 4
#: Of a reply, where nothing is measured yet: a verdict and one or two sentences.
EXPECTED_REPLY = 120

# "Images and vision" of OpenAI's documentation: high detail fits the image into 2048 × 2048, then its short side to
# 768, and counts tiles of 512 × 512. The longest name that fits counts. (tokens of an image, tokens of a tile)
_TILES = {
    "gpt-4o": (85, 170),
    "chatgpt-4o": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "gpt-4.1": (85, 170),
    "gpt-4.5": (85, 170),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
}
# The same page: patches of 32 × 32, at most 1536 of them, times a factor.
_PATCHES = {"gpt-4.1-mini": 1.62, "gpt-4.1-nano": 2.46, "gpt-5-mini": 1.62, "gpt-5-nano": 2.46, "o4-mini": 1.72}
# Patches of a vision encoder as the model merges them, without limits that a server may set: (pixels a side)
_MERGED = {"qwen2-vl": 28, "qwen2.5-vl": 28, "qwen3-vl": 32}
_UNKNOWN = 28


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever currency; None if they are not given."""

    prompt: float | None = None
    completion: float | None = None

    @property
    def are_known(self) -> bool:
        return self.prompt is not None and self.completion is not None

    def cost(self, usage: Mapping[str, float]) -> float | None:
        if self.prompt is None or self.completion is None:
            return None
        return (usage.get("prompt_tokens", 0) * self.prompt + usage.get("completion_tokens", 0) * self.completion) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What questions will take.

    Attributes:
        prompt_tokens, completion_tokens: expected.
        max_completion_tokens: if every reply were as long as it may be.
        image_rule: how pictures were counted, in words.
    """

    num_calls: int
    num_images: int
    prompt_tokens: int
    completion_tokens: int
    max_completion_tokens: int
    image_rule: str

    def lines(self, prices: Prices) -> list[str]:
        """For people."""
        lines = [
            f"{self.num_calls:,} calls with {self.num_images:,} images",
            f"about {self.prompt_tokens:,} prompt tokens (text: {CHARACTERS_PER_TOKEN} characters a token; images: "
            f"{self.image_rule})",
            f"about {self.completion_tokens:,} completion tokens (at most {self.max_completion_tokens:,})",
        ]
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        expected, most = prices.cost(usage), prices.cost(usage | {"completion_tokens": self.max_completion_tokens})
        if expected is None or most is None:
            return [*lines, "cost: give --price-in and --price-out (of a million tokens) to see it"]
        return [*lines, f"cost: about {expected:.2f}, at most about {most:.2f}, without retries"]


def estimate(
    tasks: Iterable[Task], model: str, drawn_size: tuple[int, int], reply_tokens: float | None = None
) -> Estimate:
    """What the questions will take.

    Args:
        drawn_size: (width, height) of pictures that are not drawn yet.
        reply_tokens: of a reply, as measured before.
    """
    calls = images = prompt = most = 0
    completion = 0.0
    sizes: dict[Path, tuple[int, int]] = {}
    for task in tasks:
        calls += 1
        images += sum(isinstance(part, JudgeImage) for part in task.question.parts)
        prompt += prompt_tokens(task, model, drawn_size, sizes)
        completion += min(reply_tokens or EXPECTED_REPLY, task.question.max_tokens)
        most += task.question.max_tokens
    return Estimate(calls, images, prompt, round(completion), most, image_rule(model))


def prompt_tokens(
    task: Task, model: str, drawn_size: tuple[int, int], sizes: dict[Path, tuple[int, int]] | None = None
) -> int:
    """About how many tokens a question has."""
    sizes = {} if sizes is None else sizes
    question = task.question
    tokens = TOKENS_PER_MESSAGE * (2 if question.system else 1) + text_tokens(question.system)
    for part in question.parts:
        if isinstance(part, str):
            tokens += text_tokens(part)
            continue
        path = task.pictures[part.number] if part.path == "result" and part.number < len(task.pictures) else part.path
        size = drawn_size if path in (None, "result") else _size(Path(path), sizes) or drawn_size  # type: ignore[arg-type]
        fixed = None if part.size_of is None else _size(part.size_of, sizes)
        tokens += image_tokens(model, prepared_size(part, size, fixed), part.detail)
    return tokens


def text_tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def image_tokens(model: str, size: tuple[int, int], detail: str = "auto") -> int:
    """Tokens of an image of (width, height); ``auto`` counts as high detail."""
    name, (width, height) = _plain(model), size
    if (tiles := _longest(name, _TILES)) and len(tiles) > len(_longest(name, _PATCHES)):
        base, each = _TILES[tiles]
        return base if detail == "low" else base + each * num_tiles(width, height)
    if patches := _longest(name, _PATCHES):
        return math.ceil(num_patches(width, height) * _PATCHES[patches])
    side = next((side for family, side in _MERGED.items() if family in name), _UNKNOWN)
    return math.ceil(width / side) * math.ceil(height / side) + 2


def image_rule(model: str) -> str:
    name = _plain(model)
    tiles, patches = _longest(name, _TILES), _longest(name, _PATCHES)
    if len(tiles) > len(patches):
        base, each = _TILES[tiles]
        return f"{base} + {each} a tile of 512 × 512, OpenAI's rule for {tiles}"
    if patches:
        return f"{_PATCHES[patches]} × patches of 32 × 32, OpenAI's rule for {patches}"
    family = next((family for family in _MERGED if family in name), None)
    side = _MERGED[family] if family else _UNKNOWN
    whose = f"as {family} has them" if family else f"assumed, since nothing is known of {model}"
    return f"one a patch of {side} × {side}, {whose}"


def num_tiles(width: int, height: int) -> int:
    """Of 512 × 512, after fitting into 2048 × 2048 and then the short side to 768; nothing is enlarged."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return math.ceil(round(width * scale, 6) / 512) * math.ceil(round(height * scale, 6) / 512)


def num_patches(width: int, height: int, limit: int = 1536) -> int:
    """Of 32 × 32; an image with more than `limit` is shrunk until a whole number of them fits."""
    if (patches := math.ceil(width / 32) * math.ceil(height / 32)) <= limit:
        return patches
    scale = math.sqrt(limit * 32**2 / (width * height))
    columns, rows = width * scale / 32, height * scale / 32
    scale *= min(math.floor(columns) / columns, math.floor(rows) / rows)
    return min(limit, math.ceil(round(width * scale / 32, 6)) * math.ceil(round(height * scale / 32, 6)))


def used(judgements: Iterable[Judgement]) -> dict[str, int]:
    """Tokens that judgements took, as the server counted them."""
    total = {"prompt_tokens": 0, "completion_tokens": 0}
    for judgement in judgements:
        for name in total:
            total[name] += judgement.usage.get(name, 0)
    return total


def measured_reply(judgements: Sequence[Judgement]) -> float | None:
    """Mean tokens of a reply; None before any."""
    counts = [
        judgement.usage["completion_tokens"] for judgement in judgements if "completion_tokens" in judgement.usage
    ]
    return sum(counts) / len(counts) if counts else None


def _plain(model: str) -> str:
    """Without the owner: ``Qwen/Qwen2.5-VL-7B-Instruct`` → ``qwen2.5-vl-7b-instruct``."""
    return model.lower().rsplit("/", 1)[-1].replace("_", "-")


def _longest(name: str, families: Iterable[str]) -> str:
    """The longest of the families that the name begins with: ``gpt-4o-mini`` is no ``gpt-4o``."""
    found = [family for family in families if name == family or name.startswith(f"{family}-")]
    return max(found, key=len, default="")


def _size(path: Path, known: dict[Path, tuple[int, int]]) -> tuple[int, int] | None:
    """(width, height) from the file's header."""
    if path not in known:
        try:
            with Image.open(path) as image:
                known[path] = image.size
        except OSError:
            return None
    return known[path]
