"""Imagine-Bench: is the fantasy there, is the thing still itself, and is it a good picture? (SPEC.md §2)"""

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
    weighted_mean,
)
from echo4o.evaluate.parsing import Answer, Number, Text
from echo4o.evaluate.rows import data_file, each_once, field, name_part, prompt_of, read_lines

FILES = ("Imagine.jsonl", "imagine_bench.jsonl")
MERGED = {
    "COLOR": "Attribute shift",
    "SHAPE": "Attribute shift",
    "SIZE": "Attribute shift",
    "MATERIAL": "Hybridization",
    "COMBINATION": "Hybridization",
    "TIME": "Spatiotemporal",
    "ENVIRONMENT": "Spatiotemporal",
    "Multi-Object": "Multi-Object",
}
WEIGHTS = {"Attribute shift": 3.0, "Hybridization": 2.0, "Spatiotemporal": 2.0, "Multi-Object": 2.0}
SCORES = Answer(
    (
        Number("fantasy_fulfillment", 0, 10, aliases=("fantasy", "fantasy_fulfilment")),
        Number("identity_preservation", 0, 10, aliases=("identity",)),
        Number("aesthetic_quality", 0, 10, aliases=("aesthetic", "aesthetics")),
        Text("reason", about="one or two sentences for each score"),
    )
)
SYSTEM = (
    "You audit the quality of generated pictures without mercy. High scores are for the best work only. What counts is "
    "how well a picture fulfils an imaginative task."
)
RUBRIC = """\
Score the picture for the task below on three scales, each a whole number from 0 to 10.

PROMPT (what was asked for):
{prompt}

EXPLANATION (what has to change, and what has to stay):
{note}

Fantasy Fulfillment: does the picture carry out the change that is described?
  0: ignored or contradicted. 1-3: hinted at, mostly wrong. 4-6: partly there, or not convincing. 7-9: there, with \
small faults. 10: every element exactly as described, in texture, shape and how it blends in, and believable.

Identity Preservation: can the original object or person still be recognised at once?
  0: gone. 1-3: barely. 4-6: some features are lost. 7-9: clear, with small deviations. 10: every feature that is not \
to change is kept. Identity needs realistic detail: score cartoons and other stylised renderings lower.

Aesthetic Quality: clarity, realism and composition.
  0: unusable. 1-3: poor. 4-6: mediocre, visible faults. 7-9: good. 10: could pass for professional work.

Be strict; do not give the benefit of the doubt. Cartoonish or inconsistent results must not score high.

Answer with a JSON object and nothing else: "fantasy_fulfillment", "identity_preservation" and "aesthetic_quality" as \
numbers first, then "reason"."""


@dataclass(frozen=True)
class ImagineBench(Benchmark):
    """270 prompts of four merged types, three scores from 0 to 10."""

    name = "imagine-bench"
    title = "Imagine-Bench"
    scale = "0-10"
    judge = "gpt-4.1-2025-04-14"
    num_items = 270
    source = "Imagine.jsonl of Echo-4o's repository"
    tags = tuple(WEIGHTS)
    published_rows = {
        "Echo-4o": 7.80,
        "BLIP3-o + Echo data": 7.37,
        "OmniGen2 + Echo data": 7.01,
        "BLIP3-o": 6.51,
        "OmniGen2": 6.22,
        "BAGEL": 6.20,
    }
    caveats = (
        "Upstream's shipped script drops the type Multi-Object from its total by a misspelt key (60 of 270 items); the "
        "documented weights 3/2/2/2 are used here, and the shipped total is given beside.",
        "Upstream leaves missing pictures out, which raises the mean; failed calls count as 0, unread scales as -1.",
        "Upstream asks for lines of text and cuts decimals off; here the reply is JSON and 7.5 stays 7.5.",
    )

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"preset": "t2i", "height": 1024, "width": 1024}

    def load(self, path: Path | None) -> list[Item]:
        if path is None:
            raise BenchmarkDataError(f"the prompts of {self.title} are no data set of the hub; pass {self.source}")
        file = data_file(path, FILES, self.title)
        items = []
        for place, row in read_lines(file):
            kind = field(row, "type", str, place)
            if kind not in MERGED:
                raise BenchmarkDataError(f"{place}: unknown type {kind!r}; known: {', '.join(MERGED)}")
            items.append(
                Item(
                    id=name_part(field(row, "id", (int, str), place), place),
                    prompt=prompt_of(row, "instruction", place),
                    tag=MERGED[kind],
                    fields={"note": field(row, "note", str, place), "type": kind},
                )
            )
        return each_once(items, file)

    def questions(self, item: Item) -> list[Question]:
        text = RUBRIC.format(prompt=item.prompt, note=item.fields["note"])
        return [Question("scores", SYSTEM, (text, JudgeImage()), SCORES, max_tokens=1024)]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """0.8 · min(fantasy, identity) + 0.2 · aesthetic, to three digits."""
        status = failure(judgements, ["scores"])
        if status != "ok":
            published = {"api_error": 0.0, "parse_error": -1.0}.get(status)
            return ItemScore(item.id, item.tag, published, 0.0, {}, status)
        answer = judgements["scores"].answer or {}
        parts = {part.name: float(answer[part.name]) for part in SCORES.fields if isinstance(part, Number)}
        fantasy, identity, aesthetic = parts.values()
        value = round(0.8 * min(fantasy, identity) + 0.2 * aesthetic, 3)
        return ItemScore(item.id, item.tag, value, value, parts)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: WEIGHTS[tag] for tag in counts}

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        """With ``as_shipped``: what upstream's script prints, without Multi-Object."""
        totals = super().aggregate(scores)
        shipped = {
            tag: one.published
            for tag, one in totals.per_tag.items()
            if one.published is not None and tag != "Multi-Object"
        }
        others = {"as_shipped": weighted_mean(shipped, WEIGHTS)} if shipped else {}
        judged = [score for score in scores if score.status == "ok"]
        for name in judged[0].parts if judged else ():
            others[f"mean_{name}"] = sum(score.parts[name] for score in judged) / len(judged)
        return replace(totals, others=others)
