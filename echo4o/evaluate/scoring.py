"""From judgements, or the results of a benchmark's own scorer, to ``scores.json``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from echo4o.evaluate.benchmark import Aggregates, Benchmark, Item, ItemScore, Judgement
from echo4o.evaluate.cost import Prices, used
from echo4o.evaluate.journal import Key
from echo4o.evaluate.judging import still_valid
from echo4o.evaluate.questions import Task
from echo4o.evaluate.run_folder import RunFolder, write_whole


def valid_judgements(
    tasks: Sequence[Task], judgements: Mapping[Key, Sequence[Judgement]], judge: str
) -> dict[str, dict[str, Judgement]]:
    """Item → question → the judgement of just this question, these pictures and this judge; absent if there is none."""
    found: dict[str, dict[str, Judgement]] = {}
    for task in tasks:
        judgement = still_valid(task, judgements.get(task.key, ()), judge)
        if judgement is not None:
            found.setdefault(task.item.id, {})[task.question.name] = judgement
    return found


def score_items(
    benchmark: Benchmark, items: Sequence[Item], judgements: Mapping[str, Mapping[str, Judgement]]
) -> list[ItemScore]:
    return [benchmark.score(item, judgements.get(item.id, {})) for item in items]


def write_scores(
    run: RunFolder,
    benchmark: Benchmark,
    scores: Sequence[ItemScore],
    judge: str | None,
    judgements: Sequence[Judgement] = (),
    prices: Prices | None = None,
) -> Aggregates:
    """``scores.json``: totals, tags, tokens, and every item.

    Args:
        judgements: every judgement of the run, also those that no longer count: they were paid for, too.
    """
    totals = benchmark.aggregate(scores)
    content: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "scale": benchmark.scale,
        "judge": judge,
        "date": time.strftime("%Y-%m-%d"),
        "published": totals.published,
        "strict": totals.strict,
        "num_items": len(scores),
        "statuses": dict(Counter(score.status for score in scores)),
        "per_tag": {tag: asdict(one) for tag, one in totals.per_tag.items()},
        "others": dict(totals.others),
        "notes": list(totals.notes),
        "usage": used(judgements),
        "cost": (prices or Prices()).cost(used(judgements)),
        "items": [asdict(score) for score in scores],
    }
    write_whole(run.scores, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return totals


def summary(benchmark: Benchmark, totals: Aggregates) -> list[str]:
    """The result for people, a line each."""
    published = "none" if totals.published is None else f"{totals.published:.4g}"
    lines = [f"{benchmark.title}: {published} by the published formula, {totals.strict:.4g} strict ({benchmark.scale})"]
    for tag, one in totals.per_tag.items():
        value = "none" if one.published is None else f"{one.published:.4g}"
        lost = one.failed + one.missing
        lines.append(f"  {tag}: {value}, strict {one.strict:.4g}, {one.n} items" + (f", {lost} lost" if lost else ""))
    lines += [f"  {name}: {value:.4g}" for name, value in totals.others.items()]
    return [*lines, *(f"  note: {note}" for note in totals.notes)]
