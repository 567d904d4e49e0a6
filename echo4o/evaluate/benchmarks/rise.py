"""RISEBench: edits that need reasoning about time, causes, space and logic. (SPEC.md §4)"""

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
from echo4o.evaluate.rows import data_file, each_once, field, inside, name_part, prompt_of, read_json, rows_of

FILE = "datav2_total_w_subtask.json"
FIVE = Answer((Number("final_score", 1, 5, integer=True, aliases=("score",)), Text("reason", ("reasoning",))))
BINARY = Answer((Number("final_score", 0, 1, integer=True, aliases=("score",)), Text("reason", ("reasoning",))))
MAX_SIDE = 768
_REPLY = 'Answer with a JSON object and nothing else: "final_score", then "reason" in one or two sentences.'
_CONSISTENCY = (
    "The first image is an original, the second the result of an edit. Is everything that the instruction does not "
    "touch the same: subjects, background, style, viewpoint? Do not judge whether the edit is right."
)
_REASONING = "Does the result show what the instruction leads to, as a careful thinker would expect it?"
_QUALITY = "The image is the result of an edit. Is it plausible and well made, without artifacts and broken shapes?"
_SCALES = {
    "five": "Give a whole number: 1 not at all, 2 hardly, 3 in part, 4 with small faults, 5 completely.",
    "binary": "Give 1 for yes, entirely, and 0 for anything less.",
}


@dataclass(frozen=True)
class Rise(Benchmark):
    """360 edits of four kinds, up to three scores from 1 to 5, given in percent."""

    name = "rise"
    title = "RISEBench"
    scale = "percent"
    judge = "gpt-4.1-2025-04-14"
    num_items = 360
    source = f"{FILE} with the folder data beside it (PhoenixZ/RISEBench on the hub)"
    tags = ("temporal_reasoning", "causal_reasoning", "spatial_reasoning", "logical_reasoning")
    caveats = (
        "Upstream's accuracy can never count items that are free of consistency as right.",
        "Where only some rows of the data have the key consistency_free, upstream's table treats every row as free of "
        "consistency (NaN is true); `as_shipped` gives that total.",
        "The judge's rubrics are ours, so that scores compare runs judged here; expect another level than published.",
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return EDIT_SETTINGS | {"cfg_img_scale": 2.0}

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"pass a folder with {self.source}")
        file = data_file(path, (FILE, f"data/{FILE}"), self.title)
        folder = file.parent / "data" if (file.parent / "data").is_dir() else file.parent
        items = []
        for place, row in rows_of(read_json(file), file, "index"):
            key = name_part(field(row, "index", (str, int), place), place)
            tag = name_part(field(row, "category", str, place), place)
            wanted = field(row, "reference_img", str, place, default="")
            text = field(row, "reference_txt", (str, int, float), place, default="")
            fields = {
                "key": key,
                "subtask": row.get("subtask", ""),
                "reference": str(text if text != "" else field(row, "reference", str, place, default="")),
                "reference_image": inside(folder, wanted, place) if wanted else None,
                "shows_source": bool(row.get("reasoning_img")),
                "without_instruction": bool(row.get("reasoning_wo_ins")),
                "consistency_free": bool(row.get("consistency_free")),
            }
            sources = source_images(row, "image", folder, place)
            items.append(Item(f"{tag}-{key}", prompt_of(row, "instruction", place), sources, tag, fields))
        return each_once(items, file)

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"{item.tag}/{item.fields['key']}.png"

    def questions(self, item: Item) -> list[Question]:
        return [self._question(name, item) for name in _names(item)]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """Weighted mean from 1 to 5, halved (not below 1) where the reasoning is wrong; then 25 · (s − 1)."""
        names = _names(item)
        status = failure(judgements, names)
        if status != "ok":
            return ItemScore(item.id, item.tag, None, 0.0, {}, status)
        values = {name: float((judgements[name].answer or {})["final_score"]) for name in names}
        if _is_logical(item):
            values = {name: 1 + 4 * value for name, value in values.items()}
        score = _percent(_weighted(values))
        complete = len(names) == (2 if _is_logical(item) else 3)
        right = float(complete and all(value == 5 for value in values.values()))
        return ItemScore(item.id, item.tag, score, score, values | {"right": right})

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: float(count) for tag, count in counts.items()}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """With the accuracy (all scores full), and the total of upstream's script where NaN makes all rows free."""
        totals = super().aggregate(scores)
        judged = [score for score in scores if score.status == "ok"]
        if not judged:
            return totals
        others = {"accuracy": 100 * sum(score.parts["right"] for score in judged) / len(judged)}
        shipped = [_percent(_weighted(_as_if_free(score.parts))) for score in judged]
        others["as_shipped"] = sum(shipped) / len(shipped)
        return replace(totals, others=others)

    def _question(self, name: str, item: Item) -> Question:
        source, result = _shown(item.references[0]), _shown("result")
        is_binary = _is_logical(item) and name != "quality"
        scale = _SCALES["binary" if is_binary else "five"]
        instruction = f"\nInstruction: {item.prompt}"
        if name == "consistency":
            text, images = f"{_CONSISTENCY} {scale} {_REPLY}{instruction}", (source, result)
        elif name == "quality":
            text, images = f"{_QUALITY} {scale} {_REPLY}", (result,)
        else:
            text, images = self._reasoning(item, scale, source, result)
        return Question(name, "", (text, *images), BINARY if is_binary else FIVE, max_tokens=4096)

    def _reasoning(self, item: Item, scale: str, source: JudgeImage, result: JudgeImage):
        """Against a reference in words or a reference image; with the source where the data asks for it."""
        text = f"{_REASONING} {scale} {_REPLY}"
        if not item.fields["without_instruction"]:
            text += f"\nInstruction: {item.prompt}"
        wanted = item.fields["reference_image"]
        if wanted is not None and _is_logical(item):
            return f"{text}\nThe first image is the right answer, the second the result.", (_shown(wanted), result)
        if item.fields["reference"]:
            text += f"\nWhat is expected: {item.fields['reference']}"
        if item.fields["shows_source"]:
            return f"{text}\nThe first image is the original, the second the result.", (source, result)
        return f"{text}\nThe image is the result.", (result,)


def _is_logical(item: Item) -> bool:
    return item.tag == "logical_reasoning"


def _names(item: Item) -> list[str]:
    names = [] if item.fields["consistency_free"] else ["consistency"]
    return [*names, "reasoning"] if _is_logical(item) else [*names, "reasoning", "quality"]


def _shown(path: Any) -> JudgeImage:
    return JudgeImage(path, max_side=MAX_SIDE, detail="high")


def _weighted(values: Mapping[str, float]) -> float:
    if "quality" not in values:
        total = 0.3 * values.get("consistency", values["reasoning"]) + 0.7 * values["reasoning"]
    elif "consistency" in values:
        total = 0.3 * values["consistency"] + 0.5 * values["reasoning"] + 0.2 * values["quality"]
    else:
        total = 0.8 * values["reasoning"] + 0.2 * values["quality"]
    return max(1.0, total / 2) if values["reasoning"] == 1 else total


def _as_if_free(values: Mapping[str, float]) -> Mapping[str, float]:
    """Without consistency, unless the item is logical (those have no quality)."""
    return {name: value for name, value in values.items() if name != "consistency" or "quality" not in values}


def _percent(score: float) -> float:
    return 25 * (score - 1)
