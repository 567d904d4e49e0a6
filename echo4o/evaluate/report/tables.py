"""Tables and charts of scores: the summary, scores beside published ones, tags, differences between runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from echo4o.evaluate.benchmark import Benchmark
from echo4o.evaluate.report import charts
from echo4o.evaluate.report.compare import TESTS, Compared, Difference
from echo4o.evaluate.report.numbers import NONE, Scale, p_text, scale_of, status_words
from echo4o.evaluate.report.reading import Result, Run
from echo4o.evaluate.scores import Interval

#: Published models drawn in the radar chart, where all of its benchmarks have their numbers.
_IN_RADAR = ("BAGEL", "Echo-4o")
FORMULA, STRICT = "published formula", "strict"


def benchmarks_of(runs: Sequence[Run]) -> list[Benchmark]:
    """Those of any run, in the order in which they are first met."""
    found = {name: result.benchmark for run in runs for name, result in run.results.items()}
    return list(found.values())


def run_name(runs: Sequence[Run], number: int) -> str:
    return f'<span class="runname run-{number % 6}">{escape(runs[number].name)}</span>'


def score_cell(value: float | None, interval: Interval | None, scale: Scale, name: str) -> str:
    """A number with its interval below."""
    small = f"<small>{scale.interval(interval)}</small>"
    return f'<td class="n" data-name="{name}">{scale.text(value)}{small}</td>'


def failures(result: Result, anchor: str) -> str:
    """Items without a verdict by status, as links into the gallery."""
    chips = [
        f'<a class="chip bad" href="#{anchor}" data-filter="{anchor}" data-kind="{status}">'
        f"{escape(status_words(status))}: {count}</a>"
        for status, count in result.statuses.items()
        if status != "ok"
    ]
    return " ".join(chips) or "0"


def summary(runs: Sequence[Run]) -> str:
    """All benchmarks of all runs: both formulas, n and what failed."""
    rows = []
    for benchmark in benchmarks_of(runs):
        for number, run in enumerate(runs):
            result = run.results.get(benchmark.name)
            if result is None:
                continue
            name = f'<a href="#{anchor_of(benchmark)}">{escape(benchmark.title)}</a>'
            name += f"<br>{run_name(runs, number)}" if len(runs) > 1 else ""
            scale, totals = result.scale, result.totals
            partial = ' <span class="chip bad">partial</span>' if result.num_open else ""
            rows.append(
                f'<tr><th scope="row">{name}{partial}</th>'
                + score_cell(totals.published, result.intervals()[0], scale, FORMULA)
                + score_cell(totals.strict, result.intervals()[1], scale, STRICT)
                + f'<td class="n" data-name="items">{len(result.entries)}</td>'
                + f'<td data-name="failed">{failures(result, f"gallery-{anchor_of(benchmark)}")}</td>'
                + f'<td data-name="scale">{escape(scale.words)}</td>'
                + f'<td data-name="judge">{escape(", ".join(result.judges)) or NONE}</td></tr>'
            )
    head = "".join(
        f'<th scope="col"{kind}>{words}</th>'
        for words, kind in (
            ("benchmark", ""),
            (FORMULA, ' class="n"'),
            (STRICT, ' class="n"'),
            ("items", ' class="n"'),
            ("failed", ""),
            ("scale", ""),
            ("judge", ""),
        )
    )
    caption = "Small numbers are 95 % bootstrap intervals over items; they do not hold the judge's own variance."
    return (
        f'<div class="scroll"><table class="stack"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---------------------------------------------------------------- beside published scores


def beside_published(runs: Sequence[Run]) -> str:
    """A ranking for each benchmark, and a radar chart where there are three or more."""
    benchmarks = benchmarks_of(runs)
    panels = [_radar(runs, benchmarks)] if len(benchmarks) >= 3 else []
    panels += [_ranking(runs, benchmark) for benchmark in benchmarks]
    return f'<div class="beside">{"".join(panels)}</div>'


def _radar(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> str:
    series = []
    for model in _IN_RADAR:
        if all(model in benchmark.published_rows for benchmark in benchmarks):
            shares = [scale_of(b.scale).share(b.published_rows[model]) for b in benchmarks]
            series.append(charts.Series(f"{model} (published)", shares, f"published-{_IN_RADAR.index(model)}"))
    for number, run in enumerate(runs):
        totals = [run.results[b.name].totals.published if b.name in run.results else None for b in benchmarks]
        shares = [scale_of(b.scale).share(t) for b, t in zip(benchmarks, totals, strict=True) if t is not None]
        if len(shares) == len(benchmarks):
            series.append(charts.Series(run.name, shares, f"run-{number % 6}"))
    if not series:
        return ""
    axes = [(b.title, f"{scale_of(b.scale).low:g} … {scale_of(b.scale).high:g}") for b in benchmarks]
    drawn = charts.key([(one.name, one.colour) for one in series])
    return (
        f'<div class="panel radars"><div><h3>All benchmarks</h3>{charts.radar(axes, series)}{drawn}</div>'
        f"{_all_rows(runs, benchmarks)}</div>"
    )


def _all_rows(runs: Sequence[Run], benchmarks: Sequence[Benchmark]) -> str:
    """Runs and published models by benchmark, as numbers."""
    rows = []
    for number, run in enumerate(runs):
        totals = [run.results[b.name].totals.published if b.name in run.results else None for b in benchmarks]
        cells = "".join(
            f'<td class="n">{scale_of(b.scale).text(t)}</td>' for b, t in zip(benchmarks, totals, strict=True)
        )
        rows.append(f'<tr class="own"><th scope="row">{run_name(runs, number)}</th>{cells}</tr>')
    for model in dict.fromkeys(model for benchmark in benchmarks for model in benchmark.published_rows):
        cells = "".join(f'<td class="n">{published_text(b, b.published_rows.get(model))}</td>' for b in benchmarks)
        rows.append(f'<tr><th scope="row">{escape(model)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col" class="n">{escape(benchmark.title)}</th>' for benchmark in benchmarks)
    caption = "Published formula. Below the runs: published scores, other judge or seeds."
    return (
        f'<div class="scroll"><table class="rank"><caption>{caption}</caption><thead><tr><th scope="col">model</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def published_text(benchmark: Benchmark, score: float | None) -> str:
    """A published score with the decimals that the most exact one of its benchmark has."""
    if score is None:
        return NONE
    decimals = max(len(f"{value:g}".partition(".")[2]) for value in benchmark.published_rows.values())
    return f"{score:.{decimals}f}"


def _ranking(runs: Sequence[Run], benchmark: Benchmark) -> str:
    scale = scale_of(benchmark.scale)
    rows: list[tuple[float, str]] = []
    for model, score in benchmark.published_rows.items():
        cells = (
            f'<th scope="row">{escape(model)}</th><td class="wide">{charts.bar(score, None, scale, colour="published")}'
        )
        rows.append((score, f'<tr>{cells}</td><td class="n">{published_text(benchmark, score)}</td></tr>'))
    for number, run in enumerate(runs):
        result = run.results.get(benchmark.name)
        if result is None or result.totals.published is None:
            continue
        drawn = charts.bar(result.totals.published, result.intervals()[0], scale, colour=f"run-{number % 6}")
        row = f'<tr class="own"><th scope="row">{run_name(runs, number)}</th><td class="wide">{drawn}</td>'
        rows.append((result.totals.published, f'{row}<td class="n">{scale.text(result.totals.published)}</td></tr>'))
    ordered = "".join(row for _, row in sorted(rows, key=lambda pair: -pair[0]))
    published = "Grey: published, other judge or seeds." if benchmark.published_rows else "No published scores known."
    return (
        f'<div class="panel"><h3>{escape(benchmark.title)}</h3><table class="rank">'
        f"<caption>{published} Scale {escape(scale.words)}.</caption><tbody>{ordered}</tbody></table></div>"
    )


# ---------------------------------------------------------------- tags


def per_tag(runs: Sequence[Run], benchmark: Benchmark) -> str:
    """Total and tags of a benchmark: bars with intervals beside their numbers, runs below each other."""
    scale, gallery = scale_of(benchmark.scale), f"gallery-{anchor_of(benchmark)}"
    present = [(i, run.results[benchmark.name]) for i, run in enumerate(runs) if benchmark.name in run.results]
    order = list(dict.fromkeys(e.item.tag for _, result in present for e in result.entries))
    tags = [tag for tag in dict.fromkeys(tag for _, result in present for tag in result.totals.per_tag)]
    body = [_tag_rows(runs, present, None, scale, "all")]
    for tag in tags:
        # Tags may be merged for the score; only those of the data can be filtered for.
        anchor = f"{gallery}-tag-{order.index(tag)}" if tag in order else gallery
        data = f' data-filter="{gallery}" data-tag="{escape(tag, quote=True)}"' if tag in order else ""
        name = f'<a href="#{quote(anchor)}"{data}>{escape(tag)}</a>' if data else escape(tag)
        body.append(_tag_rows(runs, present, tag, scale, name))
    head = (
        f'<th scope="col">tag</th><th scope="col">{charts.axis(scale)}</th><th scope="col" class="n">{FORMULA}</th>'
        f'<th scope="col" class="n">{STRICT}</th><th scope="col" class="n">items</th>'
        '<th scope="col" class="n">no image</th><th scope="col" class="n">not judged</th>'
    )
    drawn = "Bar: published formula with its 95 % interval. Diamond: strict."
    return (
        f'<div class="scroll"><table class="stack tags"><caption>{drawn}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _tag_rows(
    runs: Sequence[Run], present: Sequence[tuple[int, Result]], tag: str | None, scale: Scale, name: str
) -> str:
    rows = []
    for place, (number, result) in enumerate(present):
        score = result.totals if tag is None else result.totals.per_tag.get(tag)
        if score is None:
            continue
        ends = result.intervals(tag)
        drawn = charts.bar(score.published, ends[0], scale, colour=f"run-{number % 6}", mark=score.strict)
        label = name if place == 0 or len(present) == 1 else ""
        label += (f"<br>{run_name(runs, number)}" if label else run_name(runs, number)) if len(present) > 1 else ""
        classes = " ".join(["total"] * (tag is None) + ["group"] * (place < len(present) - 1))
        count = len(result.entries) if tag is None else score.n
        rows.append(
            f'<tr class="{classes}"><th scope="row">{label}</th><td class="wide">{drawn}</td>'
            + score_cell(score.published, ends[0], scale, FORMULA)
            + score_cell(score.strict, ends[1], scale, STRICT)
            + f'<td class="n" data-name="items">{count}</td>'
            + _count("no image", score.missing)
            + _count("not judged", score.failed)
            + "</tr>"
        )
    return "".join(rows)


def _count(name: str, number: int) -> str:
    return f'<td class="n{"" if number else " zero"}" data-name="{name}">{number}</td>'


def others(runs: Sequence[Run], benchmark: Benchmark) -> str:
    """Further totals, folded."""
    scale, rows = scale_of(benchmark.scale), []
    for number, run in enumerate(runs):
        found = run.results[benchmark.name].totals.others if benchmark.name in run.results else {}
        pairs = "".join(f"<dt>{escape(n.replace('_', ' '))}</dt><dd>{scale.text(v)}</dd>" for n, v in found.items())
        name = f"<p>{run_name(runs, number)}</p>" if len(runs) > 1 else ""
        rows.append(f"{name}<dl>{pairs}</dl>" if pairs else "")
    return f"<details><summary>Further totals</summary>{''.join(rows)}</details>" if any(rows) else ""


# ---------------------------------------------------------------- differences


def differences(comparison: Compared, scale: Scale, first: str, second: str) -> str:
    """One run against another, in total and by tag."""
    rows = "".join(_difference_row(row, scale, first, second) for row in (comparison.total, *comparison.tags))
    head = "".join(
        f'<th scope="col"{kind}>{escape(words)}</th>'
        for words, kind in (
            ("tag", ""),
            ("pairs", ' class="n"'),
            (first, ' class="n"'),
            (second, ' class="n"'),
            ("better / worse", ' class="n"'),
            ("difference", ' class="n"'),
            ("p", ' class="n"'),
            ("what it says", ""),
        )
    )
    cautions = "".join(f"<li>{escape(words)}</li>" for words in comparison.cautions)
    cautions = f'<div class="note"><ul>{cautions}</ul></div>' if cautions else ""
    tests = {row.found.test for row in (comparison.total, *comparison.tags) if row.found}
    tested = ", ".join(TESTS[test] for test in sorted(tests))
    caption = (
        f"Strict scores of the items that have a verdict in both runs, by their weights in the total. p: {tested}; "
        "of tags adjusted by Holm for their number."
    )
    return (
        f'{cautions}<div class="scroll"><table class="stack"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _difference_row(row: Difference, scale: Scale, first: str, second: str) -> str:
    found, kind = row.found, ""
    if row.is_shown and found:
        kind = "up" if found.difference > 0 else "down"
    cells = [(name, NONE, "") for name in ("pairs", first, second, "better / worse", "difference")]
    if found:
        left_out = f"{found.left_out} left out" if found.left_out else ""
        cells = [
            ("pairs", str(found.n), left_out),
            (first, scale.text(found.first), ""),
            (second, scale.text(found.second), ""),
            ("better / worse", f"{found.better} / {found.worse}", f"{found.equal} equal"),
            ("difference", scale.difference(found.difference), scale.difference_interval(found.interval)),
        ]
    cells.append(("p", p_text(row.p), ""))
    numbers = "".join(
        f'<td class="n" data-name="{escape(name, quote=True)}">{value}{f"<small>{small}</small>" if small else ""}</td>'
        for name, value, small in cells
    )
    claim = f'<td data-name="what it says"><span class="{kind}">{escape(row.claim(scale, second))}</span></td>'
    name = f'<th scope="row">{escape(row.tag) or "all"}</th>'
    return f"<tr{'' if row.tag else ' class=total'}>{name}{numbers}{claim}</tr>"


def anchor_of(benchmark: Benchmark) -> str:
    """The id of a benchmark's section."""
    return quote(benchmark.name, safe="").replace("%", "_")
