"""The report for programs: everything as JSON, and the scores that a model card takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from echo4o.evaluate.report.compare import Compared, Difference
from echo4o.evaluate.report.facts import warnings, without_place
from echo4o.evaluate.report.numbers import status_words
from echo4o.evaluate.report.reading import Entry, Result, Run
from echo4o.evaluate.scores import Interval


def report_json(runs: Sequence[Run], compared: Sequence[tuple[str, int, Compared]], version: str) -> dict[str, Any]:
    """``{"version", "warnings", "runs": [{"name", "benchmarks": {…}}], "comparisons": […]}``.

    Numbers are not rounded. Pictures are named relative to the run's folder where they lie in it.
    """
    return {
        "version": version,
        "warnings": [words for words, _ in warnings(runs)],
        "runs": [
            {"name": run.name, "benchmarks": {n: _result(r, run) for n, r in run.results.items()}} for run in runs
        ],
        "comparisons": [
            {
                "benchmark": benchmark,
                "first": runs[0].name,
                "second": runs[second].name,
                "cautions": list(comparison.cautions),
                "total": _difference(comparison.total, runs, benchmark, second),
                "tags": [_difference(row, runs, benchmark, second) for row in comparison.tags],
            }
            for benchmark, second, comparison in compared
        ],
    }


def scores_for_card(run: Run) -> list[dict[str, Any]]:
    """``[{"benchmark", "score", "num_items", "judge", "note"}]`` by the published formula.

    The note holds the scale, the interval, the strict score and whatever failed; benchmarks without a score are left
    out.
    """
    rows = []
    for result in run.results.values():
        totals, scale = result.totals, result.scale
        if totals.published is None:
            continue
        notes = [f"scale {scale.words}", f"95 % interval {scale.interval(result.intervals()[0])}"]
        if scale.text(totals.strict) != scale.text(totals.published):
            notes.append(f"strict {scale.text(totals.strict)}")
        notes += [f"{status_words(name)}: {count}" for name, count in result.statuses.items() if name != "ok"]
        official = result.benchmark.num_items
        if official and official != len(result.entries):
            notes.append(f"not all {official} official items")
        rows.append(
            {
                "benchmark": result.benchmark.title,
                "score": round(totals.published, scale.decimals),
                "num_items": len(result.entries),
                "judge": ", ".join(result.judges),
                "note": "; ".join(notes),
            }
        )
    return rows


def _result(result: Result, run: Run) -> dict[str, Any]:
    totals = result.totals
    published, strict = result.intervals()
    tags = {}
    for tag, score in totals.per_tag.items():
        ends = result.intervals(tag)
        tags[tag] = {**asdict(score), "published_interval": _ends(ends[0]), "strict_interval": _ends(ends[1])}
    return {
        "title": result.benchmark.title,
        "scale": result.benchmark.scale,
        "published": totals.published,
        "published_interval": _ends(published),
        "strict": totals.strict,
        "strict_interval": _ends(strict),
        "num_items": len(result.entries),
        "statuses": dict(result.statuses),
        "partial": bool(result.num_open),
        "others": dict(totals.others),
        "notes": [*totals.notes],
        "caveats": [*result.benchmark.caveats],
        "judges": result.judges,
        "usage": dict(result.usage),
        "run": {n: without_place(v) if isinstance(v, str) else v for n, v in result.facts.items()},
        "published_rows": dict(result.benchmark.published_rows),
        "per_tag": tags,
        "items": [_entry(entry, run) for entry in result.entries],
    }


def _entry(entry: Entry, run: Run) -> dict[str, Any]:
    return {
        "id": entry.item.id,
        "tag": entry.score.tag,
        "prompt": entry.item.prompt,
        "status": entry.score.status,
        "published": entry.score.published,
        "strict": entry.score.strict,
        "parts": dict(entry.score.parts),
        "images": [_place(path, run) if path else None for path in entry.images],
        "judgements": [
            {"question": j.question, "status": j.status, "answer": j.answer, "error": j.error, "judge": j.judge}
            for j in entry.judgements
        ],
    }


def _place(path: Any, run: Run) -> str:
    resolved, folder = path.resolve(), run.folder.resolve()
    return resolved.relative_to(folder).as_posix() if resolved.is_relative_to(folder) else path.name


def _difference(row: Difference, runs: Sequence[Run], benchmark: str, second: int) -> dict[str, Any]:
    scale = runs[0].results[benchmark].scale
    found = asdict(row.found) if row.found else {}
    if row.found:
        found["interval"] = _ends(row.found.interval)
        found["p_value"] = row.found.p_value
    return {"tag": row.tag, **found, "p_adjusted": row.p, "claim": row.claim(scale, runs[second].name)}


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
