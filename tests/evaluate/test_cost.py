"""Tokens beforehand: rules of OpenAI's documentation by its own examples, and a stated assumption for the rest."""

from pathlib import Path

import pytest

from echo4o.evaluate.benchmark import Item, JudgeImage, Judgement, Question
from echo4o.evaluate.cost import (
    Prices,
    estimate,
    image_rule,
    image_tokens,
    measured_reply,
    num_patches,
    num_tiles,
    used,
)
from echo4o.evaluate.parsing import Answer, Number
from echo4o.evaluate.questions import Task


@pytest.mark.parametrize(
    "model, size, detail, tokens",
    [
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4.1-2025-04-14", (1024, 1024), "auto", 765),
        ("gpt-4.1", (2048, 4096), "high", 1105),
        ("gpt-4o-2024-11-20", (4096, 8192), "low", 85),
        ("gpt-4o-mini", (1024, 1024), "high", 2833 + 4 * 5667),
        ("openai/o3", (64, 64), "auto", 225),
        ("gpt-4.1-mini-2025-04-14", (1024, 1024), "auto", 1659),
        ("gpt-4.1-nano", (1800, 2400), "auto", 3572),
        ("Qwen/Qwen2.5-VL-7B-Instruct", (1024, 1024), "auto", 37 * 37 + 2),
        ("some-model", (56, 28), "auto", 4),
    ],
)
def test_image_tokens(model, size, detail, tokens):
    assert image_tokens(model, size, detail) == tokens


def test_tiles_and_patches():
    assert [num_tiles(*size) for size in [(1024, 1024), (2048, 4096), (512, 512), (513, 512), (3000, 300)]] == [
        4,
        6,
        1,
        2,
        4,
    ]
    assert num_patches(1024, 1024) == 1024 and num_patches(1800, 2400) == 1452
    assert num_patches(9000, 33) <= 1536


def test_rules_are_told():
    assert image_rule("gpt-4.1-2025-04-14") == "85 + 170 a tile of 512 × 512, OpenAI's rule for gpt-4.1"
    assert "rule for gpt-4.1-mini" in image_rule("gpt-4.1-mini")
    assert image_rule("my-judge").endswith("assumed, since nothing is known of my-judge")


def task(text: str = "x" * 400, max_tokens: int = 512) -> Task:
    question = Question("verdict", "y" * 40, (text, JudgeImage()), Answer((Number("correct", 0, 1),)), max_tokens)
    return Task(Item("1", "kite"), question, (None,), "hash")


def test_an_estimate_and_its_words():
    found = estimate([task(), task()], "gpt-4.1", (1024, 1024))
    assert (found.num_calls, found.num_images, found.prompt_tokens) == (2, 2, 2 * (100 + 10 + 8 + 765))
    assert (found.completion_tokens, found.max_completion_tokens) == (240, 1024)
    assert found.lines(Prices(2.0, 8.0))[-1] == "cost: about 0.01, at most about 0.01, without retries"
    assert "--price-in" in found.lines(Prices(2.0))[-1]
    assert estimate([task(max_tokens=50)], "gpt-4.1", (64, 64), reply_tokens=70.5).completion_tokens == 50


def test_what_was_used():
    made = [
        Judgement("b", "1", "q", "ok", usage={"prompt_tokens": 1_000_000, "completion_tokens": 10}),
        Judgement("b", "2", "q", "api_error"),
        Judgement("b", "3", "q", "ok", usage={"prompt_tokens": 500_000, "completion_tokens": 30}),
    ]
    assert used(made) == {"prompt_tokens": 1_500_000, "completion_tokens": 40}
    assert Prices(2.0, 8.0).cost(used(made)) == pytest.approx(3.00032)
    assert Prices().cost(used(made)) is None
    assert measured_reply(made) == 20 and measured_reply([]) is None


def test_sizes_come_from_the_pictures(tmp_path: Path):
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("RGB", (2048, 1024)).save(path)
    question = Question("q", "", (JudgeImage(path, max_side=512), JudgeImage()), Answer((Number("n", 0, 1),)))
    one = Task(Item("1", "kite"), question, (path,), "hash")
    assert estimate([one], "gpt-4o", (1, 1)).prompt_tokens == 4 + (85 + 170) + (85 + 170 * 6)
