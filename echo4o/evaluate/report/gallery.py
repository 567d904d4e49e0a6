"""The gallery of a benchmark: prompt, references, pictures, verdicts and reasons of every item, runs side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from echo4o.evaluate.benchmark import Item, Judgement
from echo4o.evaluate.report.numbers import Scale, status_words
from echo4o.evaluate.report.pictures import Pictures
from echo4o.evaluate.report.reading import Entry, Result

#: Reasons longer than this are folded.
_LONG = 260


@dataclass(frozen=True)
class Card:
    """One item, with its entry in each run (None where a run does not have it)."""

    item: Item
    entries: tuple[Entry | None, ...]
    row: int

    @property
    def present(self) -> list[Entry]:
        return [entry for entry in self.entries if entry is not None]

    @property
    def change(self) -> float | None:
        """Strict score of the last run minus that of the first; None unless both are judged."""
        if len(self.entries) < 2:
            return None
        first, last = self.entries[0], self.entries[-1]
        if first is None or last is None or not (is_judged(first) and is_judged(last)):
            return None
        return last.score.strict - first.score.strict


def is_judged(entry: Entry) -> bool:
    """Whether the item's score says something of the model: a missing image does, a judge that failed does not."""
    return entry.score.status in ("ok", "missing_image")


def cards(results: Sequence[Result | None]) -> list[Card]:
    """Items of all runs in the data's order; with several runs those that changed most come first."""
    found: dict[str, Item] = {}
    for result in results:
        for entry in result.entries if result else ():
            found.setdefault(entry.item.id, entry.item)
    by_id = [{entry.item.id: entry for entry in result.entries} if result else {} for result in results]
    every = [Card(item, tuple(one.get(name) for one in by_id), row) for row, (name, item) in enumerate(found.items())]
    if len(results) < 2:
        return every
    return sorted(every, key=lambda card: (card.change is None, -abs(card.change or 0.0)))


def gallery(
    results: Sequence[Result | None], runs: Sequence[str], pictures: Pictures, anchor: str, scale: Scale
) -> str:
    """The whole gallery. `anchor`: id of the element, and beginning of those of its cards."""
    every = cards(results)
    binary = {entry.score.strict for card in every for entry in card.present} <= {scale.low, scale.high}
    kinds = {card.item.id: _kinds(card, scale, binary) for card in every}
    seen: set[str] = set()
    blocks = []
    for card in every:
        tag_anchor = f"{anchor}-tag-{len(seen)}" if card.item.tag not in seen else ""
        seen.add(card.item.tag)
        blocks.append(_card(card, kinds[card.item.id], runs, pictures, anchor, scale, tag_anchor))
    several = len(runs) > 1
    return (
        f'<div class="gallery" id="{anchor}">{_filters(every, kinds, several)}'
        f'<div class="items{" several" if several else ""}">{"".join(blocks)}</div>'
        '<div class="more"><button type="button">Show more</button></div></div>'
    )


# ---------------------------------------------------------------- filters


def _kinds(card: Card, scale: Scale, binary: bool) -> list[str]:
    """Under which choices of the filter a card is shown."""
    kinds: list[str] = []
    middle = (scale.low + scale.high) / 2
    for entry in card.present:
        if is_judged(entry):
            low, high = ("wrong", "right") if binary else ("low", "high")
            kinds.append(low if entry.score.strict < middle else high)
        if entry.score.status != "ok":
            kinds += ["failed", entry.score.status]
    if card.change:
        kinds += ["changed", "better" if card.change > 0 else "worse"]
    return list(dict.fromkeys(kinds))


_KIND_WORDS = {
    "right": "right",
    "wrong": "wrong",
    "high": "upper half of the scale",
    "low": "lower half of the scale",
    "failed": "failures: no picture or no verdict",
    "missing_image": status_words("missing_image"),
    "api_error": status_words("api_error"),
    "parse_error": status_words("parse_error"),
    "not_judged": status_words("not_judged"),
    "changed": "runs differ",
    "better": "last run better than first",
    "worse": "last run worse than first",
}


def _filters(every: Sequence[Card], kinds: Mapping[str, Sequence[str]], several: bool) -> str:
    counts = Counter(kind for card in every for kind in kinds[card.item.id])
    tags = Counter(card.item.tag for card in every)
    shown = [("", f"everything ({len(every)})")]
    shown += [(kind, f"{words} ({counts[kind]})") for kind, words in _KIND_WORDS.items() if counts[kind]]
    sorts = [("change", "changed most"), ("worse", "worse now"), ("better", "better now")] if several else []
    sorts += [("row", "as in the data"), ("low", "lowest score first"), ("high", "highest score first")]
    fields = [
        _select("Show", "show", shown),
        _select("Tag", "tag", [("", "every tag"), *((tag, f"{tag} ({n})") for tag, n in tags.items() if tag)]),
        _select("Sort", "sort", sorts),
        '<label>Search<input type="search" name="search" placeholder="prompt, reason, id" autocomplete="off"></label>',
        '<button type="reset">Clear</button><output aria-live="polite"></output>',
    ]
    return f'<form class="filters" aria-label="Filter the gallery">{"".join(fields)}</form>'


def _select(label: str, name: str, options: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<option value="{escape(value, quote=True)}">{escape(words)}</option>' for value, words in options)
    return f'<label>{label}<select name="{name}">{inner}</select></label>'


# ---------------------------------------------------------------- one item


def _card(
    card: Card,
    kinds: Sequence[str],
    runs: Sequence[str],
    pictures: Pictures,
    anchor: str,
    scale: Scale,
    tag_anchor: str,
) -> str:
    item, several = card.item, len(runs) > 1
    name = escape(f"{anchor}-{item.id}", quote=True)
    scores = [entry.score.strict for entry in card.present if is_judged(entry)]
    data = f'data-row="{card.row}" data-tag="{escape(item.tag, quote=True)}" data-kinds="{" ".join(kinds)}"'
    data += f' data-score="{sum(scores) / len(scores):.4f}"' if scores else ""
    change = ""
    if card.change is not None:
        data += f' data-change="{card.change:.4f}"'
        direction = "up" if card.change > 0 else "down" if card.change < 0 else ""
        change = f'<span class="change {direction}">change {scale.difference(card.change)}</span>'
    tag = f'<span class="chip">{escape(item.tag)}</span>' if item.tag else ""
    jump = f'<i id="{tag_anchor}"></i>' if tag_anchor else ""
    references = "".join(
        _figure(pictures.html(path, f"Reference {number} of item {item.id}"), f"image {number}")
        for number, path in enumerate(item.references, start=1)
    )
    parts = [
        f'<header><a href="#{quote(f"{anchor}-{item.id}")}">{escape(item.id)}</a>{tag}{change}</header>',
        f'<p class="prompt" dir="auto">{escape(item.prompt)}</p>',
        f'<div class="pictures refs">{references}</div>' if references else "",
    ]
    sides = []
    for number, (run, entry) in enumerate(zip(runs, card.entries, strict=True)):
        heading = f'<h4><span class="runname run-{number % 6}">{escape(run)}</span></h4>' if several else ""
        body = _side(entry, run if several else "", pictures, scale) if entry else "<p>not part of this run</p>"
        sides.append(f'<div class="side run-{number % 6}">{heading}{body}</div>')
    parts.append(f'<div class="sides">{"".join(sides)}</div>' if several else sides[0])
    parts.append(_row(item))
    return f'<article class="item" id="{name}" {data}>{jump}{"".join(parts)}</article>'


def _side(entry: Entry, run: str, pictures: Pictures, scale: Scale) -> str:
    """What one run made of an item."""
    many = len(entry.images) > 1
    of_run = f", drawn by {run}" if run else ""
    figures = "".join(
        _figure(pictures.html(path, f"{entry.item.prompt}{of_run}"), f"picture {number}" if many else "")
        for number, path in enumerate(entry.images, start=1)
    )
    verdict = f'<div class="verdict">{_score(entry, scale)}{_reasons(entry)}</div>'
    return f'<div class="made"><div class="pictures">{figures}</div>{verdict}</div>'


def _figure(picture: str, caption: str) -> str:
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture}{words}</figure>"


def _score(entry: Entry, scale: Scale) -> str:
    score = entry.score
    bits = []
    if score.status in ("ok", "missing_image"):
        if scale.name == "0-1" and score.strict in (scale.low, scale.high) and len(score.parts) < 2:
            word, kind = ("right", "good") if score.strict == scale.high else ("wrong", "bad")
            bits.append(f'<span class="chip {kind}">{word}</span>')
        else:
            bits.append(f'<span class="score">{scale.text(score.strict)}</span>')
        if score.published is not None and score.published != score.strict:
            bits.append(f"<small>by the published formula {scale.text(score.published)}</small>")
        elif score.published is None:
            bits.append("<small>left out by the published formula</small>")
    if score.status != "ok":
        bits.append(f'<span class="chip bad">{escape(status_words(score.status))}</span>')
    if len(score.parts) > 1:
        bits += [f'<span class="chip">{escape(_words(name))} {value:g}</span>' for name, value in score.parts.items()]
    return f"<p>{' '.join(bits)}</p>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _reasons(entry: Entry) -> str:
    # The box in place of a picture says already that it is missing.
    told = [judgement for judgement in entry.judgements if judgement.status != "missing_image"]
    return "".join(_reason(judgement, len(told) > 1) for judgement in told)


def _reason(judgement: Judgement, named: bool) -> str:
    name = f"<b>{escape(judgement.question)}</b> " if named else ""
    if judgement.status != "ok":
        words = judgement.error or status_words(judgement.status)
        if judgement.text:
            words = f"{words}. The reply was: {judgement.text}"
        return _folded(words, f"{name}<b>{escape(status_words(judgement.status))}:</b> ")
    answer = judgement.answer or {}
    texts = [str(value) for value in answer.values() if isinstance(value, str) and value.strip()]
    words = "\n".join(texts) or (judgement.text or "")
    return _folded(words, name) if words.strip() else ""


def _folded(words: str, before: str) -> str:
    """A reason; the rest of a long one opens on demand."""
    words = words.strip()
    if len(words) <= _LONG:
        return f'<p class="reason" dir="auto">{before}{_lines(words)}</p>'
    cut = words.rfind(" ", 0, _LONG - 40)
    cut = cut if cut > 0 else _LONG - 40
    return (
        f'<details class="reason"><summary dir="auto">{before}{escape(words[:cut])} …</summary>'
        f'<p dir="auto">… {_lines(words[cut:].strip())}</p></details>'
    )


def _lines(words: str) -> str:
    return escape(words).replace("\n", "<br>")


def _row(item: Item) -> str:
    """The other fields of the data's row, folded."""
    fields = {name: value for name, value in item.fields.items() if value not in (None, "", [], {})}
    if not fields:
        return ""
    pairs = "".join(f"<dt>{escape(str(name))}</dt><dd dir=auto>{escape(_value(v))}</dd>" for name, v in fields.items())
    names = escape(_words(", ".join(map(str, fields))))
    return f'<details class="row"><summary>{names}</summary><dl>{pairs}</dl></details>'


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
