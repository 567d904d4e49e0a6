"""What a run was made with, and what must be known before its numbers are believed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.evaluate.report.numbers import counted, status_words
from echo4o.evaluate.report.reading import Result, Run

#: Of ``run.json``; the rest follows in its own order.
_FIRST = (
    "model", "fingerprint", "dtype", "quantize", "images_from", "seed", "settings", "options", "judge",
    "judge_served_as", "judge_server", "prompts", "num_items", "limit", "started", "finished", "versions",
)  # fmt: skip
_JUDGE_ONLY = ("api_error", "parse_error")
HOW_TO_READ = (
    "Published formula: as the benchmark's own script counts, so that the number can stand beside published ones. "
    "Strict: a picture or a verdict that is missing counts as the lowest score; no item is left out.",
    "Intervals (95 %) come from drawing the items again with replacement, within their tags. They say how much another "
    "choice of prompts could move the score. Where all items of a tag have one score the interval has no width; that "
    "is no certainty.",
    "The judge's own variance comes on top: judged again, a mean of 0–10 scores moves by about ±0.3, and another judge "
    "or other seeds move it further. Published scores were made with other seeds and often with another judge.",
    "A difference between runs is claimed only with p < 0.05 and at least 20 pairs, 6 of them unequal. No claim does "
    "not mean that the runs are equal.",
)


def fact_pairs(result: Result) -> list[tuple[str, str]]:
    """Name and value of everything that ``run.json`` says, then what judging took. Paths are cut to their ends."""
    facts = dict(result.facts)
    order = [name for name in _FIRST if name in facts] + [name for name in facts if name not in _FIRST]
    pairs = [(name.replace("_", " "), _value(facts[name])) for name in order if facts[name] not in (None, "", {}, [])]
    if result.judges and "judge" not in facts:
        pairs.append(("judge", ", ".join(result.judges)))
    if tokens := {name: count for name, count in result.usage.items() if count}:
        pairs.append(
            ("tokens of the judge", ", ".join(f"{n:,} {name.removesuffix('_tokens')}" for name, n in tokens.items()))
        )
    return pairs


def model_name(result: Result) -> str:
    """The model of a run as far as ``run.json`` names it: a folder by its last parts."""
    model = result.facts.get("model")
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("path")
    return without_place(str(model)) if model else ""


def warnings(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """Sentences for the top of a report, and whether each says that a number is not final or not whole.

    What holds of several results is said once.
    """
    found: dict[tuple[str, bool], dict[str, list[str]]] = {}
    having: Counter[str] = Counter()
    for run in runs:
        for result in run.results.values():
            title = result.benchmark.title
            having[title] += 1
            for warning in _warnings(result):
                found.setdefault(warning, {}).setdefault(title, []).append(run.name)
    sentences = []
    for (words, grave), places in sorted(found.items(), key=lambda pair: not pair[0][1]):
        where = [t if len(names) == having[t] else f"{t} of {' and '.join(names)}" for t, names in places.items()]
        sentences.append((f"{', '.join(where)}: {words}", grave))
    return sentences


def _warnings(result: Result) -> Iterator[tuple[str, bool]]:
    total, statuses, benchmark = len(result.entries), result.statuses, result.benchmark
    if result.num_open:
        yield (
            f"partial. {result.num_open} of {counted(total, 'item')} not judged yet; the published formula leaves them "
            "out, the strict one counts them as the lowest score. The same command goes on where it was.",
            True,
        )
    if lost := [f"{status_words(name)}: {statuses[name]}" for name in _JUDGE_ONLY if statuses[name]]:
        number = sum(statuses[name] for name in _JUDGE_ONLY)
        yield (
            f"{counted(number, 'item')} without a verdict ({', '.join(lost)}). That is the judge's failure, not the "
            "model's; the strict score counts them as the lowest.",
            True,
        )
    if missing := statuses["missing_image"]:
        yield (
            f"{missing} of {counted(total, 'item')} without a picture; the strict score counts them as the lowest.",
            True,
        )
    official = benchmark.num_items
    if official and total != official:
        yield f"{total} items instead of the official {official}; not comparable with published scores.", True
    if len(result.judges) > 1:
        yield f"judged by more than one judge ({', '.join(result.judges)}).", True
    if benchmark.judge and result.judges and benchmark.judge not in result.judges and benchmark.published_rows:
        yield (
            f"judged by {', '.join(result.judges)}, the published scores by {benchmark.judge}; only runs of one judge "
            "compare well.",
            False,
        )


def without_place(text: str) -> str:
    """The last parts of an absolute path, without anybody's home folder; other texts as they are."""
    parts = Path(text).parts
    if not Path(text).is_absolute() or "\n" in text:
        return text
    return "/".join(parts[-max(1, min(2, len(parts) - 3)) :]).lstrip("/")


def _value(value: Any) -> str:
    if isinstance(value, str):
        return without_place(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_value(inner) for inner in value)
    return json.dumps(value, ensure_ascii=False, default=str)
