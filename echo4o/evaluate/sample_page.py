"""The page of a run's samples: a row a step, newest first, a column a request. It needs nothing but its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1c1e; --soft: #5f6066; --rule: #dedfe3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131417; --card: #1d1f23; --ink: #ececf0; --soft: #a5a7b0; --rule: #35373e; }
}
* { box-sizing: border-box }
body {
  margin: 0; padding: 1.25rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
h1 { font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
p { margin: .2rem 0 1rem; color: var(--soft) }
.frame { overflow: auto; max-height: calc(100vh - 7rem); border: 1px solid var(--rule); border-radius: 10px }
table { border-collapse: separate; border-spacing: 0; background: var(--card) }
th, td { padding: .7rem; border-bottom: 1px solid var(--rule); vertical-align: top; text-align: left }
td, thead th { min-width: 11rem; max-width: 17rem }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; font-weight: 400 }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--card); min-width: 9.5rem }
thead th:first-child { z-index: 2 }
tbody th { font-weight: 400 }
tbody th b { font-size: 1.1rem }
.id { color: var(--soft); font-size: .85em }
.references { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .4rem }
.references img { width: 3.2rem; height: 3.2rem; object-fit: contain; border: 1px solid var(--rule) }
td img { width: 100%; min-width: 9rem; display: block; margin-bottom: .3rem; border: 1px solid var(--rule) }
dl { display: grid; grid-template-columns: auto auto; gap: 0 .6rem; margin: .4rem 0 0; font-size: .85em }
dt { color: var(--soft); overflow-wrap: anywhere } dd { margin: 0; font-variant-numeric: tabular-nums }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9em }
"""
#: Losses that are shown, by metric name, and what they are called.
_SHOWN = (
    ("val/mse", "validation"),
    ("val/ce", "text"),
    ("val/mse/t_0.9", "from 90% noise"),
    ("val/copy_reference/t_0.9", "… copying"),
    ("val/predict_mean/t_0.9", "… the mean"),
)


def page_html(steps: Sequence[Mapping[str, Any]], name: str = "") -> str:
    """The page.

    Args:
        steps: of ``step.json``, oldest first: ``step``, ``losses`` by metric name, and ``requests`` with ``id``,
            ``prompt``, ``references``, ``pictures`` (file names), ``text`` and ``problem``.
        name: of the run.
    """
    newest_first = list(reversed(steps))
    requests: dict[str, Mapping[str, Any]] = {}
    for step in newest_first:
        for request in step["requests"]:
            requests.setdefault(request["id"], request)
    title = f"Samples of {name}" if name else "Samples"
    head = "".join(f"<th>{_request(request)}</th>" for request in requests.values())
    rows = "".join(_row(step, list(requests)) for step in newest_first)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file:">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>Each request is drawn from the same noise at every step; the newest comes first. Reload for later ones.</p>
<div class="frame" tabindex="0"><table>
<thead><tr><th>step</th>{head}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
</body>
</html>
"""  # noqa: E501


def _request(request: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<img src="references/{quote(file)}" alt="image {number}" title="image {number}">'
        for number, file in enumerate(request["references"], start=1)
    )
    references = f'<div class="references">{pictures}</div>' if pictures else ""
    return f'<div class="id">{escape(request["id"])}</div>{escape(request["prompt"])}{references}'


def _row(step: Mapping[str, Any], order: Sequence[str]) -> str:
    by_id = {request["id"]: request for request in step["requests"]}
    folder = f"{step['step']:07d}"
    cells = "".join(f"<td>{_answer(by_id[name], folder) if name in by_id else ''}</td>" for name in order)
    losses = "".join(
        f"<dt>{words}</dt><dd>{step['losses'][name]:.3g}</dd>" for name, words in _SHOWN if name in step["losses"]
    )
    facts = f"<dl>{losses}</dl>" if losses else ""
    return f'<tr><th scope="row"><b>{step["step"]:,}</b>{facts}</th>{cells}</tr>\n'


def _answer(request: Mapping[str, Any], folder: str) -> str:
    pictures = "".join(
        f'<a href="{folder}/{quote(file)}"><img loading="lazy" src="{folder}/{quote(file)}" '
        f'alt="{escape(request["prompt"])}"></a>'
        for file in request["pictures"]
    )
    words = request["text"] or request["problem"]
    return pictures + (f'<div class="text">{escape(words)}</div>' if words else "")
