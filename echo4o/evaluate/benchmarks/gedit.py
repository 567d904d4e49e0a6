"""GEdit-Bench: edits that users ask for, judged on success and on quality. (SPEC.md §4)"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
    weighted_mean,
)
from echo4o.evaluate.benchmarks.edits import EDIT_SETTINGS
from echo4o.evaluate.hub_data import hub_folder, image_folder, stored_image, table_files, table_rows
from echo4o.evaluate.parsing import Answer, Number, Text
from echo4o.evaluate.rows import each_once, field, name_part, prompt_of

HUB = "stepfun-ai/GEdit-Bench"
SEMANTICS = Answer((Number("edit_success", 0, 10), Number("no_overediting", 0, 10), Text("reasoning", ("reason",))))
QUALITY = Answer((Number("naturalness", 0, 10), Number("no_artifacts", 0, 10), Text("reasoning", ("reason",))))
ASK_SEMANTICS = """\
The first image is an original, the second an edited version of it. All people in them are made by AI. Judge the edit \
by two numbers from 0 to 10.
edit_success: does the second image follow the instruction? 0: not at all. 10: perfectly.
no_overediting: is everything else as it was? 0: a different scene. 10: nothing but what was asked for has changed.
Answer with a JSON object and nothing else: "edit_success", "no_overediting", then "reasoning" in one sentence.

Instruction: {instruction}"""
ASK_QUALITY = """\
The image was made by AI; so are all people in it. Judge its quality by two numbers from 0 to 10.
naturalness: does it look natural, with sensible distances, shadows and light? 0: not at all. 10: like a photograph.
no_artifacts: is it free of distortions, marks, blurred faces, odd hands or limbs, things that do not fit together? \
0: full of them. 10: none.
Answer with a JSON object and nothing else: "naturalness", "no_artifacts", then "reasoning" in one sentence."""


@dataclass(frozen=True)
class GEdit(Benchmark):
    """Edits of eleven groups in English or Chinese, two times two scores from 0 to 10.

    Attributes:
        language: of the instructions.
    """

    language: Literal["en", "cn"] = "en"

    name = "gedit"
    title = "GEdit-Bench"
    scale = "0-10"
    judge = "gpt-4.1-2025-04-14"
    source = HUB
    tags = (
        "background_change",
        "color_alter",
        "material_alter",
        "motion_change",
        "ps_human",
        "style_change",
        "subject-add",
        "subject-remove",
        "subject-replace",
        "text_change",
        "tone_transfer",
    )
    caveats = (
        "Upstream draws a random number for a reply that it fails to read twice; such items are left out here.",
        "Published scores differ by language and by the intersection set: both are given.",
    )

    def __post_init__(self) -> None:
        if self.language not in ("en", "cn"):
            raise ValueError(f"language is {self.language!r}; use en or cn")

    @property
    def settings(self) -> Mapping[str, Any]:
        return EDIT_SETTINGS | {"cfg_interval": (0.4, 1.0)}

    def load(self, path: Path | None) -> list[Item]:
        """From the hub, or a folder with its tables."""
        folder = hub_folder(HUB) if path is None else Path(path)
        files = table_files(folder) if folder.is_dir() else []
        if not files:
            raise BenchmarkDataError(f"{folder} holds no *.parquet or *.arrow of {HUB}")
        return each_once(list(self._items(files)), folder)

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"fullset/{item.tag}/{self.language}/{item.fields['key']}.png"

    def sidecars(self, item: Item) -> Mapping[str, str | Path]:
        # Upstream's scorer looks for this name; what reads it goes by the content, whatever the suffix.
        return {f"fullset/{item.tag}/{self.language}/{item.fields['key']}_SRCIMG.png": item.references[0]}

    def questions(self, item: Item) -> list[Question]:
        result = JudgeImage(size_of=item.references[0])
        ask = ASK_SEMANTICS.format(instruction=item.prompt)
        return [
            Question("SC", "", (ask, JudgeImage(item.references[0]), result), SEMANTICS),
            Question("PQ", "", (ASK_QUALITY, result), QUALITY),
        ]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """√(SC · PQ), each the smaller of its two numbers."""
        status = failure(judgements, ["SC", "PQ"])
        if status != "ok":
            return ItemScore(item.id, item.tag, None, 0.0, {}, status)
        parts = {
            name: min(float((judgements[name].answer or {})[part.name]) for part in answer.fields[:2])
            for name, answer in (("SC", SEMANTICS), ("PQ", QUALITY))
        }
        parts["intersection"] = float(bool(item.fields["intersection"]))
        value = math.sqrt(parts["SC"] * parts["PQ"])
        return ItemScore(item.id, item.tag, value, value, parts)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: 1.0 for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """With means over the groups of SC and PQ, and the total over the intersection set."""
        totals = super().aggregate(scores)
        judged = [score for score in scores if score.status == "ok"]
        others = {}
        for name in ("SC", "PQ") if judged else ():
            of_part = [replace(score, published=score.parts[name]) for score in judged]
            others[name] = self._total(of_part)
        if shared := [score for score in judged if score.parts["intersection"]]:
            others["intersection"] = self._total(shared)
        return replace(totals, others=others)

    def _total(self, scores: Sequence[ItemScore]) -> float:
        groups: dict[str, list[float]] = {}
        for score in scores:
            groups.setdefault(score.tag, []).append(score.published or 0.0)
        return weighted_mean({tag: sum(v) / len(v) for tag, v in groups.items()}, dict.fromkeys(groups, 1.0))

    def _items(self, files: Sequence[Path]) -> Iterator[Item]:
        store = image_folder(HUB)
        for place, row in table_rows(files):
            if field(row, "instruction_language", str, place) != self.language:
                continue
            key = name_part(field(row, "key", (str, int), place), place)
            tag = name_part(field(row, "task_type", str, place), place)
            image = row.get("input_image_raw") or row.get("input_image")
            source = stored_image(image, store / tag / self.language, key, place)
            fields = {"key": key, "intersection": bool(row.get("Intersection_exist"))}
            prompt = prompt_of(row, "instruction", place)
            yield Item(f"{tag}-{self.language}-{key}", prompt, (source,), tag, fields)
