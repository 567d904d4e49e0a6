"""WISE: prompts that need knowledge of the world. (SPEC.md §4)"""

from __future__ import annotations

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
    JudgeImage,
    Judgement,
    Question,
    failure,
)
from echo4o.evaluate.parsing import Answer, Number, Text
from echo4o.evaluate.rows import data_file, each_once, field, name_part, prompt_of, read_json, rows_of

FILE = "final_data.json"
SPLITS = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
#: Last id of each category.
CATEGORIES = {"Cultural": 400, "Time": 567, "Space": 700, "Biology": 800, "Physics": 900, "Chemistry": 1000}
WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
SCORES = Answer((*(Number(name, 0, 2, integer=True) for name in WEIGHTS), Text("reason")))
SYSTEM = (
    "You judge generated pictures with great strictness. Full marks are for pictures without any fault; where you "
    "doubt, give the lower mark."
)
RUBRIC = """\
A picture was made from the PROMPT. The EXPLANATION tells what the prompt implies and the picture has to show.

PROMPT: {prompt}
EXPLANATION: {explanation}

Give three whole numbers from 0 to 2.
Consistency: does the picture show what the prompt means, all of it, by the explanation? 0: not, or contradicted. \
1: in part. 2: completely.
Realism: are materials, light, shapes and physics as in the world (as far as the prompt asks for it)? 0: broken. 1: \
visible faults. 2: true to life.
Aesthetic quality: composition, colours, clarity. 0: poor. 1: ordinary, with weak spots. 2: excellent.

Answer with a JSON object and nothing else: "consistency", "realism", "aesthetic_quality", then "reason"."""


@dataclass(frozen=True)
class Wise(Benchmark):
    """1000 prompts of six fields of knowledge, three scores from 0 to 2."""

    name = "wise"
    title = "WISE"
    scale = "0-1"
    judge = "gpt-4o-2024-11-20"
    num_items = 1000
    source = "final_data.json, or data/*.json of WISE's repository"
    tags = tuple(CATEGORIES)
    caveats = (
        "Upstream gives no total once a single judgement has failed; neither does the published score here.",
        "The total is the unweighted mean of six categories with 100 to 400 items.",
        "With thoughts (--think) scores are higher: compare like with like.",
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"preset": "t2i", "height": 1024, "width": 1024}

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"the prompts of {self.title} are no data set of the hub; pass {self.source}")
        path = Path(path)
        folder = path / "data" if (path / "data" / SPLITS[0]).is_file() else path
        if folder.is_dir() and not (folder / FILE).is_file() and any((folder / name).is_file() for name in SPLITS):
            files = [data_file(folder / name, (name,), self.title) for name in SPLITS]
        else:
            files = [data_file(folder, (FILE,), self.title)]
        items = []
        for file in files:
            for place, row in rows_of(read_json(file), file, "prompt_id"):
                number = field(row, "prompt_id", int, place)
                fields = {"explanation": field(row, "Explanation", str, place), "category": row.get("Category", "")}
                name = name_part(number, place)
                items.append(Item(name, prompt_of(row, "Prompt", place), (), _category(number, place), fields))
        return each_once(items, path)

    def questions(self, item: Item) -> list[Question]:
        text = RUBRIC.format(prompt=item.prompt, explanation=item.fields["explanation"])
        return [Question("scores", SYSTEM, (text, JudgeImage()), SCORES, max_tokens=2000)]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """(0.7 · consistency + 0.2 · realism + 0.1 · aesthetic) / 2."""
        status = failure(judgements, ["scores"])
        if status != "ok":
            return ItemScore(item.id, item.tag, None, 0.0, {}, status)
        answer = judgements["scores"].answer or {}
        parts = {name: float(answer[name]) for name in WEIGHTS}
        value = sum(weight * parts[name] for name, weight in WEIGHTS.items()) / 2
        return ItemScore(item.id, item.tag, value, value, parts)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: 1.0 for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        totals = super().aggregate(scores)
        if all(score.status == "ok" for score in scores):
            return totals
        note = "upstream gives no total while an item has no score: neither does `published`"
        return replace(totals, published=None, notes=[*totals.notes, note])


def _category(number: int, place: str) -> str:
    for name, last in CATEGORIES.items():
        if 1 <= number <= last:
            return name
    raise BenchmarkDataError(f"{place}: prompt_id {number} is not in 1 to {max(CATEGORIES.values())}")
