"""KRIS-Bench: edits that need knowledge, of one or several images. (SPEC.md §4)"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
from echo4o.evaluate.benchmarks.kris_rubrics import ANSWERS, METRICS, rubric
from echo4o.evaluate.rows import each_once, field, inside, name_part, prompt_of, read_json, rows_of

#: Category → its types, as the paper groups them.
CATEGORIES = {
    "Attribute Perception": (
        "count_change",
        "color_change",
        "size_adjustment",
        "part_completion",
        "anomaly_correction",
    ),
    "Spatial Perception": ("viewpoint_change", "position_movement"),
    "Temporal Prediction": ("temporal_prediction",),
    "Social Science": ("humanities", "practical_knowledge"),
    "Natural Science": ("biology", "chemistry", "geography", "medicine", "mathematics", "physics"),
    "Logical Reasoning": ("abstract_reasoning", "rule-based_reasoning"),
    "Instruction Decomposition": ("multi-element_composition", "multi-instruction_execution"),
}
CATEGORY_OF = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}
META = {
    "factual": ("Attribute Perception", "Spatial Perception", "Temporal Prediction"),
    "conceptual": ("Social Science", "Natural Science"),
    "procedural": ("Logical Reasoning", "Instruction Decomposition"),
}
KNOWLEDGE = ("Social Science", "Natural Science", "Logical Reasoning")


@dataclass(frozen=True)
class Kris(Benchmark):
    """1267 edits of twenty types in seven categories, three or four scores from 1 to 5, given in percent."""

    name = "kris"
    title = "KRIS-Bench"
    scale = "percent"
    judge = "gpt-4o-2024-11-20"
    num_items = 1267
    source = "the folder KRIS_Bench of KRIS-Bench (a folder with annotation.json and images for each type)"
    tags = tuple(CATEGORIES)
    caveats = (
        "Totals are flat means over every single score, so that types with four scores weigh more.",
        "Upstream never uses its prompt for anomaly correction (a misspelt name); nor is there one here.",
        "The judge's rubrics are ours, so that scores compare runs judged here; expect another level than published.",
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return EDIT_SETTINGS

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"pass {self.source}")
        path = Path(path)
        folder = path / "KRIS_Bench" if (path / "KRIS_Bench").is_dir() else path
        kinds = sorted(kind for kind in CATEGORY_OF if (folder / kind / "annotation.json").is_file())
        if not kinds:
            raise BenchmarkDataError(f"{folder} holds no TYPE/annotation.json; pass {self.source}")
        return each_once([item for kind in kinds for item in _items(folder / kind, kind)], folder)

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"{item.fields['type']}/{item.fields['key']}.png"

    def questions(self, item: Item) -> list[Question]:
        images = _images(item)
        questions = []
        for name in _names(item):
            text = rubric(name, item.fields["type"], len(item.references), item.prompt, item.fields["explanation"])
            shown = (JudgeImage(quality=85),) if name == "quality" else images
            truth = item.fields["truth"]
            if name == "instruction" and truth is not None and item.fields["type"] == "viewpoint_change":
                shown = (*shown, "The image that was wanted, to compare with:", JudgeImage(truth))
            questions.append(Question(name, "", (text, *shown), ANSWERS[name], max_tokens=1000))
        return questions

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """Mean over the metrics of (s − 1) · 25. Published counts the metrics that are there, as upstream."""
        names = _names(item)
        parts = {}
        for name in names:
            answer = judgements[name].answer if name in judgements else None
            for metric in METRICS[name] if answer else ():
                parts[metric] = (float((answer or {})[metric]) - 1) * 25
        wanted = sum(len(METRICS[name]) for name in names)
        published = sum(parts.values()) / len(parts) if parts else None
        return ItemScore(item.id, item.tag, published, sum(parts.values()) / wanted, parts, failure(judgements, names))

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: float(count * (4 if tag in KNOWLEDGE else 3)) for tag, count in counts.items()}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """Flat means over all values, also by metric and by kind of knowledge."""
        totals = super().aggregate(scores)
        per_tag = {tag: replace(one, published=_flat(scores, (tag,))) for tag, one in totals.per_tag.items()}
        others = {}
        for name, categories in META.items():
            value = _flat(scores, categories)
            if value is not None:
                others[name] = value
        for metric in ("consistency", "quality", "instruction", "knowledge"):
            values = [score.parts[metric] for score in scores if metric in score.parts]
            if values:
                others[metric] = sum(values) / len(values)
        return replace(totals, published=_flat(scores, self.tags), per_tag=per_tag, others=others)


def _names(item: Item) -> list[str]:
    return ["consistency", "quality", "knowledge" if item.tag in KNOWLEDGE else "instruction"]


def _flat(scores: Sequence[ItemScore], tags: Sequence[str]) -> float | None:
    values = [value for score in scores if score.tag in tags for value in score.parts.values()]
    return sum(values) / len(values) if values else None


def _images(item: Item) -> tuple[str | JudgeImage, ...]:
    """What the judge sees: sources and result, frames in their order, several sources with their numbers."""
    if item.fields["type"] == "temporal_prediction":
        shown = [JudgeImage(path, quality=85) for path in item.references]
        frame = _predicted_frame(item)
        shown.insert(frame - 1 if frame else len(shown), JudgeImage(quality=85))
        return tuple(shown)
    if len(item.references) == 1:
        return (JudgeImage(item.references[0]), JudgeImage())
    parts: list[str | JudgeImage] = []
    for number, path in enumerate(item.references, 1):
        parts += [f"Reference {number}:", JudgeImage(path)]
    return (*parts, "Result:", JudgeImage())


def _predicted_frame(item: Item) -> int | None:
    """Number from 1 of the frame that the sources (``ID-FRAME.jpg``) lack; None if their names do not tell."""
    found = [re.search(r"-([0-9]+)$", path.stem) for path in item.references]
    numbers = {int(match[1]) for match in found if match}
    lacking = set(range(1, len(item.references) + 2)) - numbers
    return lacking.pop() if len(numbers) == len(item.references) and len(lacking) == 1 else None


def _items(folder: Path, kind: str) -> Iterator[Item]:
    file = folder / "annotation.json"
    for place, row in rows_of(read_json(file), file, "id"):
        key = name_part(field(row, "id", (str, int), place), place)
        truth = field(row, "gt_img", str, place, default="")
        fields = {
            "key": key,
            "type": kind,
            "explanation": field(row, "explain_en", str, place, default=""),
            "truth": inside(folder, truth, place) if truth and kind == "viewpoint_change" else None,
        }
        sources = source_images(row, "ori_img", folder, place)
        yield Item(f"{kind}-{key}", prompt_of(row, "ins_en", place), sources, CATEGORY_OF[kind], fields)
