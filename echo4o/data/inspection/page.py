"""``echo4o data preview PATH|CONFIG --out page.html``: rows as the model will see them, on one page to keep or send."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from torch import Tensor

from echo4o.data.drawing import draw_sample
from echo4o.data.errors import DataError, RowError
from echo4o.data.images import printable
from echo4o.data.inspection.opening import Opened
from echo4o.data.inspection.page_style import STYLE
from echo4o.data.inspection.stats import references_of
from echo4o.data.packing import BudgetError, Packer, PackingConfig
from echo4o.data.sample import Sample, Segment
from echo4o.data.sources.base import RowPlan, SourceGroup

DEFAULT_ROWS = 12
#: Pictures on the page are at most this wide or high; what the model sees is stated beside them.
_SIDE = 320
_LAYOUT_WIDTH = 1100


@dataclass(frozen=True)
class Shown:
    """A row on the page: its plan and its sample, or why there is none."""

    group: str
    where: str
    plan: RowPlan | None = None
    sample: Sample | None = None
    problem: str = ""


def write_page(opened: Opened, out: str | Path, *, rows: int = DEFAULT_ROWS, layouts: bool = True) -> Path:
    """Write a self-contained page with `rows` rows of each group, spread over the first epoch's order.

    Args:
        layouts: also draw how each row is packed.

    Raises:
        DataError: if there is nothing to show, or `out` cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{out}: the page is HTML; choose a name that ends in .html")
    if rows < 1:
        raise DataError(f"--rows {rows} shows nothing; at least 1")
    without_dropout = Packer(_without_dropout(opened.packer))
    sections = [_section(opened, group, list(_rows(group, rows)), without_dropout, layouts) for group in opened.groups]
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(opened.title)}</title><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(opened.title)}</h1>{_notes(opened)}{''.join(sections)}</body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}. Choose another --out.") from error
    return out


def _rows(group: SourceGroup, count: int) -> Iterator[Shown]:
    total = len(group.source)
    for position in dict.fromkeys(place * total // count for place in range(min(count, total))):
        try:
            plan = group.source.plan(0, position)
        except RowError as error:
            yield Shown(group.name, error.where, problem=str(error))
            continue
        try:
            yield Shown(group.name, plan.row, plan, plan.load())
        except RowError as error:
            yield Shown(group.name, plan.row, plan, problem=str(error))


def _without_dropout(packer: Packer) -> PackingConfig:
    names = ("text_cond_dropout_prob", "vae_cond_dropout_prob", "vit_cond_dropout_prob", "all_refs_dropout_prob")
    return replace(packer.config, **dict.fromkeys(names, 0.0), max_num_tokens=None)


# ---------------------------------------------------------------- HTML


def _notes(opened: Opened) -> str:
    limit = opened.max_num_tokens_per_sample
    notes = [f"Pictures are shown after the transforms of the config. Rows beyond {limit:,} tokens are skipped."]
    if opened.counts_words:
        notes.append("Without a model's tokenizer, words stand for tokens of text: pass --tokenizer FOLDER.")
    notes += opened.problems
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _section(opened: Opened, group: SourceGroup, rows: Sequence[Shown], packer: Packer, layouts: bool) -> str:
    heading = f"<h2>{html.escape(group.name)} <small>{len(group.source):,} rows, {len(rows)} shown</small></h2>"
    return heading + "".join(_row(opened, row, packer, layouts) for row in rows)


def _row(opened: Opened, row: Shown, packer: Packer, layouts: bool) -> str:
    where = f'<span class="where">{html.escape(printable(row.where))}</span>'
    if row.sample is None or row.plan is None:
        return f'<article class="bad"><header>{where}</header><p>{html.escape(printable(row.problem))}</p></article>'
    tokens = row.plan.num_tokens
    count = references_of(row.plan)
    badge = f"{count} reference{'s' * (count != 1)} · {tokens:,} tokens"
    is_long = tokens > opened.max_num_tokens_per_sample
    badge += " · too long, skipped" if is_long else ""
    parts = "".join(_segments(opened, row.plan, row.sample))
    layout = _layout(opened, row.sample, packer) if layouts else ""
    return (
        f'<article{" class=bad" if is_long else ""}><header>{where}<span class="badge">{badge}</span></header>'
        f'<div class="parts">{parts}</div>{layout}</article>'
    )


def _segments(opened: Opened, plan: RowPlan, sample: Sample) -> Iterator[str]:
    """Texts and pictures in sequence order; the ViT image of a reference is told beside its VAE image."""
    number, skip = 0, False
    for place, segment in enumerate(sample.segments):
        if skip:
            skip = False
            continue
        if segment.kind == "text":
            yield _text(opened, segment)
            continue
        following = sample.segments[place + 1] if place + 1 < len(sample.segments) else None
        paired = segment.kind == "vae_image" and not segment.loss and following and following.kind == "vit_image"
        skip = bool(paired)
        number += not segment.loss
        name = "target" if segment.loss else f"reference {number}"
        counts = [_count(plan, place)] + ([_count(plan, place + 1)] if paired else [])
        yield _figure(name, [segment, *([following] if paired and following else [])], counts)


def _count(plan: RowPlan, place: int) -> int:
    return plan.segments[place].num_tokens if place < len(plan.segments) else 0


def _text(opened: Opened, segment: Segment) -> str:
    words = opened.tokenizer.decode(list(segment.text_ids))
    kind = "answer" if segment.loss else "text"
    return (
        f'<div class="text {kind}"><p dir="auto">{html.escape(printable(words))}</p>'
        f"<small>{kind}, {len(segment.text_ids) + 2} tokens</small></div>"
    )


def _figure(name: str, segments: Sequence[Segment], counts: Sequence[int]) -> str:
    first = segments[0].image
    assert first is not None
    lines = []
    for segment, count in zip(segments, counts, strict=True):
        assert segment.image is not None
        height, width = segment.image.shape[1:]
        lines.append(f"{'VAE' if segment.kind == 'vae_image' else 'ViT'} {width} × {height}, {count:,} tokens")
    kind = "target" if name == "target" else "reference"
    return (
        f'<figure class="{kind}"><img src="{_data_url(_picture(first))}" alt="{name}" loading="lazy">'
        f"<figcaption><b>{name}</b><br>{'<br>'.join(lines)}</figcaption></figure>"
    )


def _layout(opened: Opened, sample: Sample, packer: Packer) -> str:
    texts = [opened.tokenizer.decode(list(s.text_ids)) for s in sample.segments if s.kind == "text"]
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "layout.png"
            draw_sample(sample, packer.pack([sample]), path, texts=texts)
            with Image.open(path) as picture:
                shown = picture.convert("RGB")
                shown.thumbnail((_LAYOUT_WIDTH, _LAYOUT_WIDTH))
    except (BudgetError, RowError, ValueError) as error:
        return f'<p class="note">its layout cannot be drawn: {html.escape(str(error))}</p>'
    url = _data_url(shown, lossless=True)
    return f'<details><summary>how it is packed</summary><img class="layout" src="{url}" alt="packed layout"></details>'


def _picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    pixels = ((image.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _data_url(picture: Image.Image, lossless: bool = False) -> str:
    data = io.BytesIO()
    if lossless:
        picture.quantize(64).save(data, "PNG", optimize=True)
    else:
        picture.save(data, "JPEG", quality=88)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
