"""ImgEdit, single turn: nine kinds of edits. (SPEC.md §4)"""

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
from echo4o.evaluate.benchmarks.edits import EDIT_SETTINGS, source_images
from echo4o.evaluate.parsing import Answer, Number, Text
from echo4o.evaluate.rows import data_file, each_once, field, name_part, prompt_of, read_json, rows_of

CRITERIA = ("compliance", "naturalness", "integrity")
SCORES = Answer((*(Number(name, 1, 5, integer=True) for name in CRITERIA), Text("reason")))
RUBRIC = """\
The first image is an original, the second an edited version of it. Judge the edit by three whole numbers from 1 (bad) \
to 5 (perfect).
compliance: is the instruction carried out, exactly and completely?
naturalness: does the edit look as if it had always been there, without seams, blur or a foreign style?
integrity: are light, perspective, proportions and fine details right, and is all else unchanged?
An edit that does not do what was asked for cannot be good: naturalness and integrity are at most as high as compliance.
Answer with a JSON object and nothing else: "compliance", "naturalness", "integrity", then "reason" in one sentence.

Kind of edit: {kind}
Instruction: {instruction}"""


@dataclass(frozen=True)
class ImgEdit(Benchmark):
    """Edits of nine kinds, three scores from 1 to 5."""

    name = "imgedit"
    title = "ImgEdit (single turn)"
    scale = "1-5"
    lowest = 1.0
    judge = "gpt-4o-2024-11-20"
    source = "Benchmark/singleturn of ImgEdit (singleturn.json and images)"
    tags = ("background", "adjust", "style", "extract", "remove", "add", "replace", "compose", "action")
    caveats = (
        "Upstream has a prompt of its own for each kind of edit; here one rubric with three criteria serves all, so "
        "that scores compare runs judged here, not with published ones.",
        "Items whose replies upstream cannot read vanish from its mean; the strict score counts them as 1.",
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return EDIT_SETTINGS

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"pass a folder with {self.source}")
        file = data_file(path, ("singleturn.json", "singleturn/singleturn.json"), self.title)
        items = []
        for place, row in rows_of(read_json(file), file, "key"):
            tag = field(row, "edit_type", str, place)
            sources = source_images(row, "id", file.parent, place)
            items.append(Item(name_part(row["key"], place), prompt_of(row, "prompt", place), sources, tag))
        return each_once(items, file)

    def questions(self, item: Item) -> list[Question]:
        text = RUBRIC.format(kind=item.tag, instruction=item.prompt)
        return [Question("scores", "", (text, JudgeImage(item.references[0]), JudgeImage()), SCORES)]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """Mean of the three, to two digits."""
        status = failure(judgements, ["scores"])
        if status != "ok":
            return ItemScore(item.id, item.tag, None, self.lowest, {}, status)
        answer = judgements["scores"].answer or {}
        parts = {name: float(answer[name]) for name in CRITERIA}
        value = round(sum(parts.values()) / len(parts), 2)
        return ItemScore(item.id, item.tag, value, value, parts)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: float(count) for tag, count in counts.items()}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """The total is over items, as upstream's; ``mean_of_types`` beside it, which papers also print."""
        totals = super().aggregate(scores)
        means = [one.published for one in totals.per_tag.values() if one.published is not None]
        return replace(totals, others={"mean_of_types": sum(means) / len(means)} if means else {})
