"""Pictures of a report: small JPEGs inside the page within a budget of bytes, or links to the files."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from echo4o.data.errors import RowError
from echo4o.data.images import open_image

RESULT_SIDE, REFERENCE_SIDE = 256, 128
#: Bytes of all thumbnails of a page; as text they take a third more.
BUDGET = 20_000_000
#: Tried in turn until the budget holds: part of the side, quality.
_STEPS = ((1.0, 82), (1.0, 70), (0.75, 70), (0.5625, 65), (0.4375, 60), (0.3125, 50), (0.1875, 40))
_SAMPLED = 60


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG, its size on the page and whether that is twice its own or more, or why there is none."""

    data: bytes = b""
    width: int = 0
    height: int = 0
    enlarged: bool = False
    problem: str = ""


class Pictures:
    """Makes ``<img>`` of files.

    Args:
        sides: every file the page shows → the longest side of its thumbnail in px.
        folder: where the page will lie; links are relative to it.
        embed: whether pictures are inside the page.
        budget: bytes of all thumbnails together; sides and quality go down until they fit.
    """

    def __init__(self, sides: Mapping[Path, int], folder: Path, *, embed: bool = True, budget: int = BUDGET) -> None:
        self.folder, self.embed = folder.resolve(), embed
        self.shrunk = False
        step = self._first_step(sides, budget) if embed else 0
        self._thumbnails = _encode_all(sides, *_STEPS[step], embed=embed)
        while embed and self.num_bytes > budget and step + 1 < len(_STEPS):
            step += 1
            self._thumbnails = _encode_all(sides, *_STEPS[step], embed=True)
        self.shrunk = step > 1

    @property
    def num_bytes(self) -> int:
        return sum(len(thumbnail.data) for thumbnail in self._thumbnails.values())

    def problem(self, path: Path) -> str:
        """Why the page cannot show a file; empty if it can."""
        return self._thumbnails[path].problem

    def html(self, path: Path | None, alt: str) -> str:
        """The picture, as a link to its file; a box that says so if it is missing or broken."""
        thumbnail = Thumbnail(problem="image missing") if path is None else self._thumbnails[path]
        if path is None or thumbnail.problem:
            name = f"<small>{escape(path.name)}</small>" if path else ""
            words = escape(thumbnail.problem)
            label = escape(f"{alt}: {thumbnail.problem}", quote=True)
            return f'<div class="nopic" role="img" aria-label="{label}"><span>{words}</span>{name}</div>'
        link = self._link(path)
        source = f"data:image/jpeg;base64,{base64.b64encode(thumbnail.data).decode()}" if self.embed else link
        size = f'width="{thumbnail.width}" height="{thumbnail.height}"'
        size += ' class="pixels"' if thumbnail.enlarged else ""
        image = f'<img src="{source}" {size} alt="{escape(alt, quote=True)}" loading="lazy" decoding="async">'
        return f'<a class="pic" href="{link}" title="Open the file">{image}</a>'

    def _link(self, path: Path) -> str:
        return quote(os.path.relpath(path.resolve(), self.folder).replace(os.sep, "/"), safe="/.-_~")

    @staticmethod
    def _first_step(sides: Mapping[Path, int], budget: int) -> int:
        """The first of the steps at which a sample of the files promises to keep to the budget."""
        paths = list(sides)
        sample = paths[:: max(1, len(paths) // _SAMPLED)]
        for step, (part, quality) in enumerate(_STEPS):
            small = _encode_all({path: sides[path] for path in sample}, part, quality, embed=True)
            if sum(len(t.data) for t in small.values()) * len(paths) <= budget * max(1, len(sample)):
                return step
        return len(_STEPS) - 1


def _encode_all(sides: Mapping[Path, int], part: float, quality: int, *, embed: bool) -> dict[Path, Thumbnail]:
    def encode(path: Path) -> Thumbnail:
        return thumbnail_of(path, max(16, round(sides[path] * part)), quality, shown=sides[path], encoded=embed)

    # Decoding leaves Python's lock; two threads are as many as small machines have cores.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(sides, pool.map(encode, sides), strict=True))


def thumbnail_of(path: Path, side: int, quality: int, *, shown: int | None = None, encoded: bool = True) -> Thumbnail:
    """A JPEG of at most `side` px, to be shown with a longest side of `shown`.

    Small pictures keep their pixels; the browser enlarges them.
    """
    try:
        image = open_image(path)
    except RowError as error:
        return Thumbnail(problem=error.reason)
    shown = shown or side
    enlarged = max(image.size) * 2 <= shown
    width, height = (max(1, round(length * shown / max(image.size))) for length in image.size)
    if not encoded:
        return Thumbnail(b"", width, height, enlarged)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, optimize=True)
    return Thumbnail(buffer.getvalue(), width, height, enlarged)
