"""The report as Markdown tables, for a README or a model card."""

from __future__ import annotations

from collections.abc import Sequence

from echo4o.evaluate.benchmark import Benchmark
from echo4o.evaluate.report.compare import TESTS, Compared, Difference
from echo4o.evaluate.report.facts import HOW_TO_READ, model_name, warnings
from echo4o.evaluate.report.numbers import NONE, Scale, p_text, scale_of, status_words
from echo4o.evaluate.report.reading import Result, Run
from echo4o.evaluate.report.tables import benchmarks_of, published_text
from echo4o.evaluate.scores import Interval


def report_markdown(runs: Sequence[Run], compared: Sequence[tuple[str, int, Compared]], title: str) -> str:
    """Summary, published scores, tags and differences."""
    benchmarks = benchmarks_of(runs)
    blocks = [f"# {_plain(title)}"]
    if found := warnings(runs):
        blocks.append("\n".join(f"- **{_plain(words)}**" if grave else f"- {_plain(words)}" for words, grave in found))
    blocks += ["## Summary", _summary(runs, benchmarks), "## Beside published scores", _published(runs, benchmarks)]
    blocks.append("Published rows: other seeds, often another judge.")
    for benchmark in benchmarks:
        blocks += [f"## {_plain(benchmark.title)}", _tags(runs, benchmark)]
        for name, second, comparison in compared:
            if name == benchmark.name:
                blocks += _differences(runs, benchmark, second, comparison)
        if benchmark.caveats:
            blocks.append("\n".join(f"- {_plain(words)}" for words in benchmark.caveats))
    blocks += ["## How to read this", "\n".join(f"- {words}" for words in HOW_TO_READ)]
    return "\n\n".join(blocks) + "\n"


def _summary(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> str:
    head = ["benchmark", "run", "model", "published formula", "strict", "items", "failed", "scale", "judge"]
    rows = []
    for benchmark in benchmarks:
        for run in runs:
            if (result := run.results.get(benchmark.name)) is None:
                continue
            published, strict = result.intervals()
            rows.append(
                [
                    benchmark.title + (" (partial)" if result.num_open else ""),
                    run.name,
                    model_name(result) or NONE,
                    _score(result.scale, result.totals.published, published),
                    _score(result.scale, result.totals.strict, strict),
                    str(len(result.entries)),
                    _failed(result),
                    result.scale.words,
                    ", ".join(result.judges) or NONE,
                ]
            )
    return table(head, rows)


def _published(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> str:
    models = list(dict.fromkeys(model for benchmark in benchmarks for model in benchmark.published_rows))
    rows = []
    for run in runs:
        cells = []
        for benchmark in benchmarks:
            result = run.results.get(benchmark.name)
            cells.append(result.scale.text(result.totals.published) if result else NONE)
        rows.append([f"**{_plain(run.name)}**", *cells])
    for model in models:
        scores = [published_text(benchmark, benchmark.published_rows.get(model)) for benchmark in benchmarks]
        rows.append([f"{_plain(model)} (published)", *scores])
    return table(["model", *(benchmark.title for benchmark in benchmarks)], rows, escaped=False)


def _tags(runs: Sequence[Run], benchmark: Benchmark) -> str:
    scale, rows = scale_of(benchmark.scale), []
    present = [(run.name, run.results[benchmark.name]) for run in runs if benchmark.name in run.results]
    for tag in dict.fromkeys(tag for _, result in present for tag in result.totals.per_tag):
        for name, result in present:
            if (score := result.totals.per_tag.get(tag)) is None:
                continue
            published, strict = result.intervals(tag)
            numbers = [_score(scale, score.published, published), _score(scale, score.strict, strict)]
            rows.append([tag, name, *numbers, str(score.n), str(score.missing), str(score.failed)])
    return table(["tag", "run", "published formula", "strict", "items", "no image", "not judged"], rows)


def _differences(runs: Sequence[Run], benchmark: Benchmark, second: int, comparison: Compared) -> list[str]:
    scale, first, other = scale_of(benchmark.scale), runs[0].name, runs[second].name
    rows = [_difference(row, scale, other) for row in (comparison.total, *comparison.tags)]
    head = ["tag", "pairs", first, other, "better / worse", "difference", "p", "what it says"]
    tests = {row.found.test for row in (comparison.total, *comparison.tags) if row.found}
    words = ", ".join(TESTS[test] for test in sorted(tests))
    blocks = [f"### {_plain(other)} against {_plain(first)}"]
    if comparison.cautions:
        blocks.append("\n".join(f"- {_plain(words)}" for words in comparison.cautions))
    return [*blocks, table(head, rows), f"Strict scores. p: {words}; of tags adjusted by Holm."]


def _difference(row: Difference, scale: Scale, other: str) -> list[str]:
    found = row.found
    if found is None:
        return [row.tag or "all", "0", NONE, NONE, NONE, NONE, NONE, row.claim(scale, other)]
    return [
        row.tag or "all",
        str(found.n),
        scale.text(found.first),
        scale.text(found.second),
        f"{found.better} / {found.worse}",
        f"{scale.difference(found.difference)} ({scale.difference_interval(found.interval)})",
        p_text(row.p),
        row.claim(scale, other),
    ]


def _score(scale: Scale, value: float | None, interval: Interval | None) -> str:
    return scale.text(value) if interval is None else f"{scale.text(value)} ({scale.interval(interval)})"


def _failed(result: Result) -> str:
    bad = [f"{status_words(name)}: {count}" for name, count in result.statuses.items() if name != "ok"]
    return ", ".join(bad) or "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = True) -> str:
    """A Markdown table; cells cannot break out of it."""
    lines = [[_plain(cell) for cell in head], ["---"] * len(head)]
    lines += [[_plain(cell) if escaped else cell for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """`text` in one line, with what Markdown would read as markup escaped."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace(">", "&gt;")
