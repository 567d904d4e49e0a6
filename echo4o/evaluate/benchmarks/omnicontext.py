"""OmniContext: subjects of reference images in a new picture. (SPEC.md §3)"""

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
from echo4o.evaluate.benchmarks.omnicontext_rubrics import SCORE, rubric
from echo4o.evaluate.hub_data import hub_folder, image_folder, stored_image, table_files, table_rows
from echo4o.evaluate.rows import data_file, each_once, field, inside, name_part, prompt_of, read_json, rows_of

HUB = "OmniGen2/OmniContext"
#: References go to the judge with at most so many pixels, sides down to multiples of 16; the drawn picture as it is.
JUDGE_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class OmniContext(Benchmark):
    """Eight types of tasks with one to three references, two scores from 0 to 10.

    Attributes:
        size: of the pictures: ``fixed`` (1024 × 1024, as OmniGen2 draws), or that of the ``first`` (Echo-4o's script)
            or ``last`` (BAGEL's inferencer) reference.
        repeats: calls for each score, whose mean counts. Upstream calls three times and keeps the last answer.
        language: of the instructions; others are left out.
    """

    size: Literal["fixed", "first", "last"] = "fixed"
    repeats: int = 1
    language: str = "en"

    name = "omnicontext"
    title = "OmniContext"
    scale = "0-10"
    judge = "gpt-4.1"
    num_items = 400
    source = HUB
    tags = (
        "single_character",
        "single_object",
        "multi_character",
        "multi_object",
        "multi_character_object",
        "scene_character",
        "scene_object",
        "scene_character_object",
    )
    published_rows = {
        "GPT-4o": 8.8,
        "Echo-4o": 8.1,
        "Gemini 2.5 Flash Image": 8.07,
        "OmniGen2 + Echo data": 7.3,
        "OmniGen2": 6.9,
        "BAGEL": 5.6,
    }
    caveats = (
        "Echo-4o averages over the six multi and scene types, OmniGen2 over all eight: compare average_of_6 with the "
        "former and the total with the latter.",
        "Upstream replaces a reply that it cannot read by a random number, and calls the judge without temperature 0.",
        "Echo-4o's script draws at the size of the first reference, OmniGen2's at 1024 × 1024.",
        "The rubric for prompt following in scene tasks, which upstream has but never uses, is used here.",
    )

    def __post_init__(self) -> None:
        if self.size not in ("fixed", "first", "last"):
            raise ValueError(f"size is {self.size!r}; use fixed, first or last")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1")

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = {"preset": "multi_ref", "cfg_img_scale": 1.5}
        return settings | ({"height": 1024, "width": 1024} if self.size == "fixed" else {"size_from": self.size})

    def load(self, path: Path | None) -> list[Item]:
        """From the hub, a folder of its tables, or a folder with upstream's ``metadata.json`` and ``images/``."""
        folder = hub_folder(HUB) if path is None else Path(path)
        files = table_files(folder) if folder.is_dir() else []
        items = list(self._of_tables(files) if files else self._of_metadata(folder))
        return each_once(items, folder)

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"{item.tag}/{item.fields['key']}.png"

    def questions(self, item: Item) -> list[Question]:
        references = [JudgeImage(path, max_pixels=JUDGE_PIXELS, stride=16) for path in item.references]
        questions = []
        for metric in ("PF", "SC"):
            text = rubric(metric, "scene" in item.tag, len(references)) + f"\n\nInstruction:\n{item.prompt}"
            for name in self._names(metric):
                questions.append(Question(name, "", (text, *references, JudgeImage()), SCORE, max_tokens=1400))
        return questions

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """√(PF · SC)."""
        status = failure(judgements, [*self._names("PF"), *self._names("SC")])
        if status != "ok":
            return ItemScore(item.id, item.tag, None, 0.0, {}, status)
        parts = {metric: self._mean(metric, judgements) for metric in ("PF", "SC")}
        value = math.sqrt(parts["PF"] * parts["SC"])
        return ItemScore(item.id, item.tag, value, value, parts)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: 1.0 for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """With the average over the six types that Echo-4o reports, published and strict, and means of PF and SC."""
        totals = super().aggregate(scores)
        others: dict[str, float] = {}
        six = {tag: one for tag, one in totals.per_tag.items() if not tag.startswith("single_")}
        published = {tag: one.published for tag, one in six.items() if one.published is not None}
        if published:
            others["average_of_6"] = weighted_mean(published, self.weights(dict.fromkeys(six, 1)))
        if six:
            others["average_of_6_strict"] = sum(one.strict for one in six.values()) / len(six)
        judged = [score for score in scores if score.status == "ok"]
        for metric in ("PF", "SC") if judged else ():
            means = {
                tag: sum(values) / len(values)
                for tag in totals.per_tag
                if (values := [score.parts[metric] for score in judged if score.tag == tag])
            }
            others[metric] = sum(means.values()) / len(means)
        return replace(totals, others=others)

    def _names(self, metric: str) -> list[str]:
        return [metric] if self.repeats == 1 else [f"{metric}-{number + 1}" for number in range(self.repeats)]

    def _mean(self, metric: str, judgements: Mapping[str, Judgement]) -> float:
        values = [float((judgements[name].answer or {})["score"]) for name in self._names(metric)]
        return sum(values) / len(values)

    def _of_tables(self, files: Sequence[Path]) -> Iterator[Item]:
        store = image_folder(HUB)
        for place, row in table_rows(files):
            language = field(row, "instruction_language", str, place, default=self.language)
            if language != self.language:
                continue
            key, tag = _names_of(row, "key", place)
            images = field(row, "input_images", list, place)
            references = [
                stored_image(image, store / tag, f"{key}_{number}", place) for number, image in enumerate(images)
            ]
            yield _item(key, tag, prompt_of(row, "instruction", place), references, place)

    def _of_metadata(self, path: Path) -> Iterator[Item]:
        file = data_file(path, ("metadata.json",), self.title)
        for place, row in rows_of(read_json(file), file, "id"):
            key, tag = _names_of(row, "id", place)
            names = field(row, "ori_img", (list, str), place)
            references = [
                inside(file.parent / "images" / tag, str(name), place)
                for name in ([names] if isinstance(names, str) else names)
            ]
            yield _item(key, tag, prompt_of(row, "ins_en", place), references, place)


def _names_of(row: dict[str, Any], key: str, place: str) -> tuple[str, str]:
    """(key, task type), both fit for a path."""
    return (
        name_part(field(row, key, (str, int), place), place),
        name_part(field(row, "task_type", str, place), place),
    )


def _item(key: str, tag: str, prompt: str, references: Sequence[Path], place: str) -> Item:
    if not references:
        raise BenchmarkDataError(f"{place} has no reference image")
    return Item(f"{tag}-{key}", prompt, tuple(references), tag, {"key": key})
