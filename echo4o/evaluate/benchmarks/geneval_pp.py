"""GenEval++: does the picture show every object with its number, colour, place and size? (SPEC.md §1)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from echo4o.evaluate.benchmarks.plurals import plural
from echo4o.evaluate.parsing import Answer, Number, Text
from echo4o.evaluate.rows import data_file, each_once, field, prompt_of, read_lines

FILES = ("Geneval++.jsonl", "geneval_plus_plus.jsonl")
ITEM_KEYS = {"class", "count", "color", "region", "size"}
VERDICT = Answer(
    (
        Number("correct", 0, 1, integer=True, about="1 if the instruction and the whole checklist hold, else 0"),
        Text("reason", about="what is wrong, or what was checked, in one or two sentences"),
    )
)
SYSTEM = """\
You check generated pictures. You get an instruction, a checklist made from it, and one picture. Decide whether the \
picture fulfils the instruction and all points of the checklist together.

Check each of these:
1. Objects: every class that is asked for is there and can be recognised.
2. Numbers: each class occurs exactly as often as asked for. Count one by one.
3. Colours: each object has its colour.
4. Places: judge by where the objects lie in the picture itself, not by what the scene suggests.
5. Sizes: what is to be larger is visibly larger than what is to be smaller, at a believable scale.

The picture must also look like one coherent, natural photograph. Drawings, cartoons, anime and other stylised \
renderings fail, and so do collages and pictures made of several panels.

Be strict: if a point does not hold, or you cannot be sure of it, the picture fails.

Answer with a JSON object and nothing else. First "correct": 1 if everything holds, 0 otherwise. Then "reason": one or \
two sentences."""


@dataclass(frozen=True)
class GenEvalPlusPlus(Benchmark):
    """280 prompts in seven tags, one picture each, right or wrong.

    Attributes:
        plurals: ``correct``, or upstream's added "s" ("buss", "sheeps") in the checklist.
    """

    plurals: Literal["correct", "published"] = "correct"

    name = "geneval++"
    title = "GenEval++"
    scale = "0-1"
    judge = "gpt-4.1"
    num_items = 280
    source = "test_scripts/Geneval++.jsonl of Echo-4o's repository"
    tags = (
        "color_attr",
        "spatial_count_attr",
        "color_spatial_attr",
        "color_count_attr",
        "multi_object_count_attr",
        "size_spatial_attr",
        "counting",
    )
    published_rows = {
        "GPT-4o": 0.739,
        "Echo-4o": 0.68,
        "Qwen-Image": 0.668,
        "OmniGen2 + Echo data": 0.47,
        "BLIP3-o + Echo data": 0.44,
        "BAGEL": 0.37,
        "OmniGen2": 0.33,
        "BLIP3-o": 0.31,
    }
    caveats = (
        "One picture a prompt and 40 prompts a tag: a tag moves by 2.5 points with each picture.",
        "Upstream pins no judge (the alias gpt-4.1) and cuts replies at 200 tokens, where a reply without its closing "
        "brace counts as wrong; here the verdict comes first and 512 tokens are allowed.",
        "The checklist names absolute parts of the picture, although the prompt may be read as relative.",
    )

    def __post_init__(self) -> None:
        if self.plurals not in ("correct", "published"):
            raise ValueError(f"plurals is {self.plurals!r}; use correct or published")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"preset": "t2i", "height": 1024, "width": 1024}

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"the prompts of {self.title} are no data set of the hub; pass {self.source}")
        file = data_file(path, FILES, self.title)
        items = []
        for number, (place, row) in enumerate(read_lines(file), 1):
            _check(row, place)
            items.append(
                Item(
                    id=str(number),
                    prompt=prompt_of(row, "prompt", place),
                    tag=field(row, "tag", str, place),
                    fields={"include": row["include"], "exclude": row.get("exclude") or []},
                )
            )
        return each_once(items, file)

    def questions(self, item: Item) -> list[Question]:
        text = f"Instruction:\n{item.prompt}\n\nExpectation checklist:\n{self.checklist(item)}"
        return [Question("verdict", SYSTEM, (text, JudgeImage()), VERDICT, max_tokens=512)]

    def checklist(self, item: Item) -> str:
        """Upstream's grammar: a header, a line for each object, and one for what there must not be more of."""
        lines = ["The image should contain the following:"]
        for wanted in item.fields["include"]:
            words = [f"{wanted['color']}-colored"] if wanted.get("color") else []
            words += [wanted["size"]] if wanted.get("size") else []
            words += [str(wanted["count"]), self._named(wanted["class"], wanted["count"])]
            region = wanted.get("region")
            where = f"located in the {region} part of the image" if region else "present in the image"
            lines.append(f"- {' '.join(words)} {where}.")
        for unwanted in item.fields["exclude"]:
            most = unwanted["count"] - 1
            lines.append(f"- No more than {most} {self._named(unwanted['class'], most)} in the image.")
        return "\n".join(lines)

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """1 for a picture with everything right; missing and failed ones are wrong in both variants, as upstream."""
        status = failure(judgements, ["verdict"])
        if status != "ok":
            return ItemScore(item.id, item.tag, None if status == "not_judged" else 0.0, 0.0, {}, status)
        correct = float((judgements["verdict"].answer or {})["correct"])
        return ItemScore(item.id, item.tag, correct, correct, {"correct": correct})

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: 1.0 for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """Published: accuracies of the tags rounded to four digits, and so is their mean. Strict: without rounding."""
        totals = super().aggregate(scores)
        judged = [score for score in scores if score.status == "ok"]
        others = {"all_samples": sum(score.strict for score in scores) / len(scores)}
        if judged:
            others["of_judged_only"] = super().aggregate(judged).strict
        accuracies = [one.published for one in totals.per_tag.values() if one.published is not None]
        rounded = [round(accuracy, 4) for accuracy in accuracies]
        published = round(sum(rounded) / len(rounded), 4) if rounded else None
        return replace(totals, published=published, others=others)

    def _named(self, name: str, count: int) -> str:
        if count == 1:
            return name
        return f"{name}s" if self.plurals == "published" and count > 1 else plural(name)


def _check(row: dict[str, Any], place: str) -> None:
    """Objects with a class and a whole number each, and no key that the checklist would leave out."""
    if not field(row, "include", list, place):
        raise BenchmarkDataError(f"{place}: 'include' is empty")
    for key in ("include", "exclude"):
        for entry in field(row, key, list, place, default=[]):
            if not isinstance(entry, dict):
                raise BenchmarkDataError(f"{place}: {key!r} holds {entry!r}, not an object")
            field(entry, "class", str, f"{place}, {key}")
            if field(entry, "count", int, f"{place}, {key}") < 1:
                raise BenchmarkDataError(f"{place}: {entry['count']} × {entry['class']} in {key!r}")
            if unknown := set(entry) - ITEM_KEYS:
                raise BenchmarkDataError(f"{place}: {key!r} has {sorted(unknown)[0]!r}; known: {sorted(ITEM_KEYS)}")
            for name in ("color", "region", "size"):
                field(entry, name, str, f"{place}, {key}", default="")
