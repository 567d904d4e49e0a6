"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from echo4o.evaluate.benchmark import Benchmark
from echo4o.evaluate.report import tables
from echo4o.evaluate.report.compare import Compared
from echo4o.evaluate.report.facts import HOW_TO_READ, fact_pairs, model_name, warnings
from echo4o.evaluate.report.gallery import cards, gallery
from echo4o.evaluate.report.numbers import counted, scale_of
from echo4o.evaluate.report.pictures import REFERENCE_SIDE, RESULT_SIDE, Pictures
from echo4o.evaluate.report.reading import Run
from echo4o.evaluate.report.script import SCRIPT
from echo4o.evaluate.report.style import STYLE

#: Nothing may be fetched, and no script but the page's own runs, whatever a prompt holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:{local}"


def page_html(
    runs: Sequence[Run],
    compared: Sequence[tuple[str, int, Compared]],
    folder: Path,
    version: str,
    *,
    embed: bool = True,
) -> str:
    """The page.

    Args:
        compared: benchmark, number of the second run, its differences to the first.
        folder: where the page will lie; links to pictures are relative to it.
        embed: whether small copies of the pictures are inside; otherwise the files are shown.
    """
    pictures = Pictures(picture_sides(runs), folder, embed=embed)
    benchmarks = tables.benchmarks_of(runs)
    title = page_title(runs)
    summary = f'<div class="panel">{tables.summary(runs)}</div>{_warnings(runs)}'
    sections = [
        f'<section id="summary"><h2>Summary</h2>{summary}</section>',
        f'<section id="published"><h2>Beside published scores</h2>{tables.beside_published(runs)}</section>',
        *(_benchmark(runs, benchmark, compared, pictures) for benchmark in benchmarks),
        f'<section id="runs"><h2>How {"it was" if len(runs) == 1 else "they were"} made</h2>{_facts(runs)}</section>',
    ]
    links = [("summary", "Summary"), ("published", "Published scores")]
    links += [(tables.anchor_of(benchmark), benchmark.title) for benchmark in benchmarks]
    links += [("runs", "Details")]
    nav = "".join(f'<li><a href="#{anchor}">{escape(words)}</a></li>' for anchor, words in links)
    reading = "".join(f"<p>{escape(words)}</p>" for words in HOW_TO_READ)
    smaller = "<p>Pictures are smaller than usual, so that the page stays below 30 MB.</p>" if pictures.shrunk else ""
    policy = _POLICY.format(local="" if embed else " 'self' file:")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header class="top"><h1>{escape(title)}</h1>{_subtitle(runs)}</header>
<nav aria-label="Sections"><ul>{nav}</ul></nav>
<main>
{"".join(sections)}
<footer><h2>How to read this</h2>{reading}{smaller}<p>Written by echo4o {escape(version)}.</p></footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def page_title(runs: Sequence[Run]) -> str:
    """Of the page and of the Markdown report."""
    if len(runs) > 1:
        return f"Comparison of {', '.join(run.name for run in runs)}"
    names = [result.benchmark.title for result in runs[0].results.values()]
    return f"{runs[0].name} on {', '.join(names)}"


def picture_sides(runs: Sequence[Run]) -> dict[Path, int]:
    """Every file that the gallery shows, and the longest side of its thumbnail."""
    sides: dict[Path, int] = {}
    for benchmark in tables.benchmarks_of(runs):
        for card in cards([run.results.get(benchmark.name) for run in runs]):
            sides |= dict.fromkeys(card.item.references, REFERENCE_SIDE)
            for entry in card.present:
                several = len(entry.images) > 1
                sides |= dict.fromkeys((p for p in entry.images if p), RESULT_SIDE // 2 if several else RESULT_SIDE)
    return sides


def _subtitle(runs: Sequence[Run]) -> str:
    lines = []
    for number, run in enumerate(runs):
        results = list(run.results.values())
        models = list(dict.fromkeys(filter(None, map(model_name, results))))
        judges = list(dict.fromkeys(judge for result in results for judge in result.judges))
        bits = [f"model {', '.join(models)}"] if models else []
        bits += [f"judged by {', '.join(judges)}"] if judges else []
        bits += [counted(sum(len(result.entries) for result in results), "item")]
        name = f"{tables.run_name(runs, number)} · " if len(runs) > 1 else ""
        lines.append(f'<p class="soft">{name}{escape(" · ".join(bits))}</p>')
    return "".join(lines)


def _warnings(runs: Sequence[Run]) -> str:
    found, boxes = warnings(runs), []
    for grave, kind in ((True, "note bad"), (False, "note")):
        lines = "".join(f"<li>{escape(words)}</li>" for words, is_grave in found if is_grave == grave)
        boxes.append(f'<div class="{kind}"><ul>{lines}</ul></div>' if lines else "")
    return "".join(boxes)


def _benchmark(
    runs: Sequence[Run],
    benchmark: Benchmark,
    compared: Sequence[tuple[str, int, Compared]],
    pictures: Pictures,
) -> str:
    anchor, scale = tables.anchor_of(benchmark), scale_of(benchmark.scale)
    notes = [*benchmark.caveats]
    for run in runs:
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        found = run.results[benchmark.name].totals.notes if benchmark.name in run.results else ()
        notes += [f"{of_run}{note}." if note[-1:].isalnum() else f"{of_run}{note}" for note in found]
    parts = [f"<h2>{escape(benchmark.title)}</h2>"]
    if notes:
        parts.append(f'<ul class="soft">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    parts.append(f'<div class="panel">{tables.per_tag(runs, benchmark)}{tables.others(runs, benchmark)}</div>')
    for name, second, comparison in compared:
        if name == benchmark.name:
            first, other = runs[0].name, runs[second].name
            table = tables.differences(comparison, scale, first, other)
            parts.append(f'<h3>{escape(other)} against {escape(first)}</h3><div class="panel">{table}</div>')
    results = [run.results.get(benchmark.name) for run in runs]
    shown = gallery(results, [run.name for run in runs], pictures, f"gallery-{anchor}", scale)
    return f'<section id="{anchor}">{"".join(parts)}<h3>Gallery</h3>{shown}</section>'


def _facts(runs: Sequence[Run]) -> str:
    blocks = []
    for number, run in enumerate(runs):
        for result in run.results.values():
            pairs = "".join(f"<dt>{escape(n)}</dt><dd><code>{escape(v)}</code></dd>" for n, v in fact_pairs(result))
            name = f"{tables.run_name(runs, number)}, {escape(result.benchmark.title)}"
            is_open = " open" if len(runs) * len(run.results) == 1 else ""
            blocks.append(
                f'<details class="panel facts"{is_open}><summary>{name}</summary>'
                f"<dl>{pairs or '<dt>run.json</dt><dd>says nothing</dd>'}</dl></details>"
            )
    return "".join(blocks)
