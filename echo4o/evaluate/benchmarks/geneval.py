"""GenEval: drawn in the layout that its own scorer (a detector) reads, whose results are summarised. (SPEC.md §4)"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import (
    Aggregates,
    Benchmark,
    BenchmarkDataError,
    Item,
    ItemScore,
    Judgement,
)
from echo4o.evaluate.rows import data_file, each_once, field, prompt_of, read_lines

FILES = ("evaluation_metadata.jsonl", "evaluation_metadata_long.jsonl", "metadata.jsonl", "geneval_prompt.jsonl")
_PICTURE = re.compile(r"(?:^|[/\\])([0-9]{5})[/\\]samples[/\\]([0-9]{5})\.\w+$")


@dataclass(frozen=True)
class GenEval(Benchmark):
    """553 prompts in six tags, four pictures each, right or wrong.

    Attributes:
        num_images: pictures a prompt.
    """

    num_images: int = 4

    name = "geneval"
    title = "GenEval"
    scale = "0-1"
    num_items = 553
    source = "prompts/evaluation_metadata.jsonl of GenEval's repository"
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    published_rows = {
        "Echo-4o": 0.89,
        "BLIP3-o + Echo data": 0.85,
        "BLIP3-o": 0.84,
        "OmniGen2 + Echo data": 0.83,
        "BAGEL": 0.82,
        "OmniGen2": 0.80,
    }
    caveats = (
        "Judged by GenEval's own scorer (a Mask2Former detector and CLIP), not by a model that is asked: draw, run "
        "evaluation/evaluate_images.py on the folder images, then read its results.jsonl.",
        "BAGEL's published number uses rewritten, longer prompts; the short ones score lower.",
    )

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}; it must be at least 1")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"preset": "t2i", "cfg_interval": (0.0, 1.0), "height": 1024, "width": 1024}

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"the prompts of {self.title} are no data set of the hub; pass {self.source}")
        file = data_file(path, FILES, self.title)
        items = []
        for number, (place, row) in enumerate(read_lines(file)):
            tag = field(row, "tag", str, place)
            field(row, "include", list, place)
            items.append(Item(f"{number:05d}", prompt_of(row, "prompt", place), (), tag, row, self.num_images))
        return each_once(items, file)

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"{item.id}/samples/{number:05d}.png"

    def sidecars(self, item: Item) -> Mapping[str, str | Path]:
        return {f"{item.id}/metadata.jsonl": json.dumps(dict(item.fields), ensure_ascii=False) + "\n"}

    def read_results(self, path: Path, items: Sequence[Item]) -> list[ItemScore]:
        """From the scorer's ``results.jsonl``: share of an item's pictures that are correct.

        Strict counts pictures that the file lacks as wrong; published leaves them out.
        """
        correct: dict[str, dict[int, bool]] = {item.id: {} for item in items}
        tags = {item.id: item.tag for item in items}
        file = data_file(path, ("results.jsonl",), f"results of {self.title}")
        for place, row in read_lines(file):
            match = _PICTURE.search(field(row, "filename", str, place))
            if match is None:
                raise BenchmarkDataError(f"{place}: {row['filename']!r} is not …/00000/samples/00000.png")
            name, number = match[1], int(match[2])
            if name not in correct:
                raise BenchmarkDataError(f"{place}: the prompts have no {name}; pass the prompts it was drawn from")
            if field(row, "tag", str, place, default=tags[name]) != tags[name]:
                raise BenchmarkDataError(f"{place}: {name} is {row['tag']!r} here and {tags[name]!r} in the prompts")
            if number in correct[name]:
                raise BenchmarkDataError(f"{place}: picture {number} of {name} twice; the file holds several runs")
            correct[name][number] = field(row, "correct", bool, place)
        return [self._score(item, correct[item.id]) for item in items]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        return ItemScore(item.id, item.tag, None, 0.0, {}, "not_judged")

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: 1.0 for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """Published: mean of the tags' shares of correct pictures, as the scorer's summary has it."""
        totals = super().aggregate(scores)
        found = [score for score in scores if score.parts]
        if not found:
            return totals
        num_images = sum(score.parts["num_images"] for score in found)
        per_tag, shares = {}, []
        for tag, one in totals.per_tag.items():
            of_tag = [score.parts for score in found if score.tag == tag]
            if of_tag:
                shares.append(sum(p["num_correct"] for p in of_tag) / sum(p["num_images"] for p in of_tag))
            per_tag[tag] = replace(one, published=shares[-1] if of_tag else None)
        others = {
            "of_images": sum(score.parts["num_correct"] for score in found) / num_images,
            "of_prompts_any": sum(score.parts["num_correct"] > 0 for score in found) / len(found),
        }
        return replace(totals, published=sum(shares) / len(shares), per_tag=per_tag, others=others)

    def _score(self, item: Item, correct: Mapping[int, bool]) -> ItemScore:
        if not correct:
            return ItemScore(item.id, item.tag, None, 0.0, {}, "missing_image")
        right = sum(correct.values())
        parts = {"num_correct": float(right), "num_images": float(len(correct))}
        strict = right / max(item.num_images, len(correct))
        status = "ok" if len(correct) >= item.num_images else "missing_image"
        return ItemScore(item.id, item.tag, right / len(correct), strict, parts, status)
