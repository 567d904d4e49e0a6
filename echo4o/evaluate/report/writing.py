"""echo4o eval report RUN… --out DIR

The files of a report: ``report.html``, ``report.md``, ``report.json`` and the scores that a model card takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from echo4o.evaluate.report.compare import Compared, compare_results
from echo4o.evaluate.report.machine import report_json, scores_for_card
from echo4o.evaluate.report.markdown import report_markdown
from echo4o.evaluate.report.page import page_html, page_title
from echo4o.evaluate.report.reading import Run, read_runs
from echo4o.evaluate.run_folder import write_whole

HTML, MARKDOWN, JSON, CARD = "report.html", "report.md", "report.json", "scores_for_card.json"


def write_report(run_folders: Sequence[Path], out: Path, *, embed: bool = True) -> list[Path]:
    """Write the report of one run, or of several, each compared with the first.

    Args:
        run_folders: what `echo4o eval BENCHMARK --out` wrote, finished or not; or one benchmark's folder in it.
        out: folder for the report; existing reports in it are replaced.
        embed: small copies of the pictures inside the page (at most 20 MB); otherwise the page shows the files
            themselves and must stay where it is.

    Returns:
        The files: ``report.html``, ``report.md``, ``report.json``, and ``scores_for_card.json`` (of several runs one
        each, ``scores_for_card_2.json`` and so on, in their order) for ``echo4o export --evaluation``.

    Raises:
        ReportError: if a folder holds no evaluation or a file of it is damaged.
        OSError: if `out` cannot be written.
    """
    runs = read_runs(run_folders)
    compared = _compared(runs)
    out = Path(out)
    release = _version()
    content = report_json(runs, compared, release)
    texts = {
        HTML: page_html(runs, compared, out, release, embed=embed),
        MARKDOWN: report_markdown(runs, compared, page_title(runs)),
        JSON: json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n",
    }
    for number, run in enumerate(runs, start=1):
        name = CARD if number == 1 else CARD.replace(".json", f"_{number}.json")
        texts[name] = json.dumps(scores_for_card(run), ensure_ascii=False, indent=2) + "\n"
    for name, text in texts.items():
        write_whole(out / name, text)
    return [out / name for name in texts]


def _compared(runs: Sequence[Run]) -> list[tuple[str, int, Compared]]:
    """Benchmark, number of the second run, its differences to the first run."""
    return [
        (name, number, compare_results(first, run.results[name]))
        for name, first in runs[0].results.items()
        for number, run in enumerate(runs)
        if number and name in run.results
    ]


def _version() -> str:
    try:
        return version("echo4o")
    except PackageNotFoundError:
        return "(not installed)"
