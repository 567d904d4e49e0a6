"""From run folders to what a report shows: items, pictures, judgements, scores and their intervals.

Scores are counted anew from ``judgements.jsonl``; only where a program of its own judges they come from
``scores.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import FAILURES, Aggregates, Benchmark, Item, ItemScore, Judgement
from echo4o.evaluate.benchmarks import benchmark as benchmark_called
from echo4o.evaluate.cost import used
from echo4o.evaluate.journal import JournalError, Key, read_judgements
from echo4o.evaluate.report.numbers import Scale, scale_of
from echo4o.evaluate.run_folder import RunFolder, RunFolderError
from echo4o.evaluate.scores import Interval, bootstrap

ITEMS = "items.jsonl"


class ReportError(ValueError):
    """A folder is no evaluation, or its files cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """An item with its pictures (None where one is missing), its judgements and its score."""

    item: Item
    images: tuple[Path | None, ...]
    judgements: tuple[Judgement, ...]
    score: ItemScore


@dataclass(frozen=True)
class Result:
    """One benchmark of one run.

    Attributes:
        published, strict: 95 % intervals of the total and by tag.
        facts: ``run.json``.
        usage: tokens of all calls to the judge, also of those whose answers were replaced by later ones.
    """

    benchmark: Benchmark
    entries: tuple[Entry, ...]
    totals: Aggregates
    published: tuple[Interval | None, Mapping[str, Interval]]
    strict: tuple[Interval | None, Mapping[str, Interval]]
    facts: Mapping[str, Any]
    usage: Mapping[str, int]

    @property
    def scores(self) -> list[ItemScore]:
        return [entry.score for entry in self.entries]

    def intervals(self, tag: str | None = None) -> tuple[Interval | None, Interval | None]:
        """Of the published and the strict score, in total or of a tag."""
        if tag is None:
            return self.published[0], self.strict[0]
        return self.published[1].get(tag), self.strict[1].get(tag)

    @property
    def scale(self) -> Scale:
        return scale_of(self.benchmark.scale)

    @property
    def statuses(self) -> Counter[str]:
        """Items by status, those that are ok first."""
        found = Counter(entry.score.status for entry in self.entries)
        return Counter({name: found[name] for name in ("ok", *FAILURES) if found[name]})

    @property
    def num_open(self) -> int:
        """Items that nobody has judged yet."""
        return self.statuses["not_judged"]

    @property
    def judges(self) -> list[str]:
        names = Counter(j.judge for entry in self.entries for j in entry.judgements if j.judge)
        return [name for name, _ in names.most_common()]


@dataclass(frozen=True)
class Run:
    """One run: a name that no other run of the report has, and its benchmarks in alphabetical order."""

    name: str
    folder: Path
    results: Mapping[str, Result]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run.

    Raises:
        ReportError: if a folder holds no evaluation, or a file of it is damaged.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ReportError("a report needs at least one run folder")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ReportError("a run folder is named twice; name each once")
    return [Run(name, folder, _results(folder)) for name, folder in zip(_names(folders), folders, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]).lstrip("/") or "run" for part in parts]


def _results(folder: Path) -> dict[str, Result]:
    inside = sorted(path.parent for path in folder.glob(f"*/{ITEMS}"))
    found = [folder] if (folder / ITEMS).is_file() else inside
    if not found:
        raise ReportError(
            f"{folder} holds no evaluation (no {ITEMS} in it or one folder below); "
            "pass the --out of an `echo4o eval BENCHMARK`"
        )
    results = (_result(path) for path in found)
    return {result.benchmark.name: result for result in results}


def _result(folder: Path) -> Result:
    place = RunFolder(folder)
    try:
        facts = place.facts()
        name = str(facts.get("benchmark", folder.name))
        benchmark = benchmark_called(name, **facts.get("options", {}))
        known = read_judgements(place.judgements)
    except (RunFolderError, JournalError) as error:
        raise ReportError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise ReportError(f"{folder}: {error}") from error
    items = [_item(row, folder / ITEMS, number) for number, row in _lines(folder / ITEMS)]
    if not items:
        raise ReportError(f"{folder / ITEMS} holds no items; run the evaluation again")
    content = _json_object(place.scores) if place.scores.is_file() else {}
    judgements = _latest(known, facts.get("judge"))
    if benchmark.questions(items[0]):
        scores = [benchmark.score(item, judgements.get(item.id, {})) for item in items]
    else:
        scores = _scores_of_file(benchmark, items, content.get("items", []), place.scores)
    entries = tuple(
        Entry(item, place.pictures(benchmark, item), tuple(judgements.get(item.id, {}).values()), score)
        for item, score in zip(items, scores, strict=True)
    )
    if content.get("cost") is not None:
        facts["cost"] = content["cost"]
    return Result(
        benchmark,
        entries,
        benchmark.aggregate(scores),
        bootstrap(benchmark, scores, "published"),
        bootstrap(benchmark, scores, "strict"),
        facts,
        used([judgement for every in known.values() for judgement in every]),
    )


def _scores_of_file(benchmark: Benchmark, items: Sequence[Item], rows: Sequence[Any], path: Path) -> list[ItemScore]:
    try:
        known = {row["item"]: ItemScore(**row) for row in rows}
    except (TypeError, KeyError) as error:
        raise ReportError(f"{path}: its items are no scores ({error}); read the scorer's results again") from error
    lowest = benchmark.lowest
    return [known.get(i.id) or ItemScore(i.id, i.tag, None, lowest, status="not_judged") for i in items]


def _latest(known: Mapping[Key, Sequence[Judgement]], judge: str | None) -> dict[str, dict[str, Judgement]]:
    """Item → question → its latest judgement by the run's judge; by any, if the run does not name one.

    After a round of judging the latest line of a question is the one that counts.
    """
    found: dict[str, dict[str, Judgement]] = {}
    for (item, question), every in known.items():
        own = [judgement for judgement in every if judge is None or judgement.judge == judge]
        if own:
            found.setdefault(item, {})[question] = own[-1]
    return found


def _item(row: Mapping[str, Any], path: Path, number: int) -> Item:
    try:
        references = tuple(path.parent / name for name in row.get("references", ()))  # absolute ones stay
        return Item(
            id=str(row["id"]),
            prompt=str(row["prompt"]),
            references=references,
            tag=str(row.get("tag", "")),
            fields=row.get("fields", {}),
            num_images=int(row.get("num_images", 1)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}, line {number}: no item ({error!r})") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of the lines; a last one without its end, from a run that was killed, does not count."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ReportError(f"{path}, line {number}: no JSON ({error}); remove the line") from error
        if not isinstance(row, dict):
            raise ReportError(f"{path}, line {number}: no JSON object; remove the line")
        yield number, row


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path} cannot be read ({error}); run the evaluation again, it goes on where it was"
        ) from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} holds no JSON object; run the evaluation again, it goes on where it was")
    return content
