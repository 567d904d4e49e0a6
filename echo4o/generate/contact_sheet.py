"""References beside results, with the prompts: one picture to judge many by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from echo4o.data.images import open_image, to_rgb
from echo4o.generate.files import partial_name

MAX_ROWS = 60
MAX_LINES = 6
MAX_CELLS = 8  # beside each other; more go below
GAP, MARGIN, FRAME = 14, 20, 2
FONT_SIZE, LABEL_SIZE = 17, 13
LEADING = 7
BACKGROUND, INK, FAINT, RULE, ACCENT = "#ffffff", "#1d1d1f", "#6e6e73", "#d2d2d7", "#0a66c2"
#: The first letters that DejaVu Sans lacks: Chinese, Japanese, Korean.
_FIRST_CJK = 0x2E80
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip

Picture = Image.Image | Path


@dataclass(frozen=True)
class Row:
    """One request on the sheet.

    Attributes:
        prompt: shown above; long ones are cut.
        references, results: pictures or their paths; results have a coloured frame.
        name: of the request, above the prompt.
        labels: of the results, e.g. their seeds.
        text: thought or answer, shown below.
    """

    prompt: str
    references: Sequence[Picture] = ()
    results: Sequence[Picture] = ()
    name: str = ""
    labels: Sequence[str] = field(default_factory=tuple)
    text: str = ""


def contact_sheet(rows: Sequence[Row], cell: int = 256) -> Image.Image:
    """The sheet; of more than `MAX_ROWS` rows the first ones.

    Args:
        cell: longest side of a picture on it, in px. Smaller pictures are enlarged by whole factors, so that single
            pixels can be told apart.
    """
    rows = rows[:MAX_ROWS]
    columns = min(MAX_CELLS, max((len(row.references) + len(row.results) for row in rows), default=1))
    width = max(columns, 2) * (cell + GAP) - GAP + 2 * FRAME + 2 * MARGIN
    blocks = [_block(row, width - 2 * MARGIN, cell) for row in rows]
    height = sum(block.height for block in blocks) + 2 * MARGIN * len(blocks)
    sheet = Image.new("RGB", (width, max(1, height)), BACKGROUND)
    top = MARGIN
    for number, block in enumerate(blocks):
        if number:
            ImageDraw.Draw(sheet).line((MARGIN, top - MARGIN, width - MARGIN, top - MARGIN), fill=RULE)
        sheet.paste(block, (MARGIN, top))
        top += block.height + 2 * MARGIN
    return sheet


def write_contact_sheet(rows: Sequence[Row], path: str | Path, cell: int = 256) -> Path:
    """Write the sheet in the format of the name's ending; the name appears when the file is whole.

    Raises:
        ValueError: for an ending that is no picture format.
        OSError: if it cannot be written.
    """
    path = Path(path)
    check_picture_name(path)
    partial = partial_name(path)
    try:
        contact_sheet(rows, cell).save(partial, format=Image.registered_extensions()[path.suffix.lower()])
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def check_picture_name(path: Path) -> None:
    """Raises ValueError if the ending is not of a common picture format."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{path}: a contact sheet ends in .png, .jpg or .webp")
    Image.init()


def _block(row: Row, width: int, cell: int) -> Image.Image:
    """One request: prompt, then references and results in cells, then its text."""
    lines = [(row.name, LABEL_SIZE, FAINT)] if row.name else []
    lines += [(words, FONT_SIZE, INK) for words in _wrapped(row.prompt, FONT_SIZE, width)]
    below = [(words, LABEL_SIZE, FAINT) for words in _wrapped(row.text, LABEL_SIZE, width)]
    cells = [(picture, f"image {i}", False) for i, picture in enumerate(row.references, start=1)]
    labels = [*row.labels, *[""] * len(row.results)]
    cells += [(picture, labels[i] or "result", True) for i, picture in enumerate(row.results)]
    pictures = [(_fitted(picture, cell), label, is_result) for picture, label, is_result in cells]
    per_row = max(1, (width - 2 * FRAME + GAP) // (cell + GAP))
    ranks = [pictures[i : i + per_row] for i in range(0, len(pictures), per_row)]
    heights = [max(picture.height for picture, _, _ in rank) + LABEL_SIZE + LEADING + GAP for rank in ranks]
    height = sum(size + LEADING for _, size, _ in (*lines, *below)) + GAP // 2 + sum(heights)
    block = Image.new("RGB", (width, height), BACKGROUND)
    top = _write_lines(block, 0, lines) + GAP // 2
    for rank, rank_height in zip(ranks, heights, strict=True):
        for column, (picture, label, is_result) in enumerate(rank):
            _paste_cell(block, (FRAME + column * (cell + GAP), top), picture, label, is_result)
        top += rank_height
    _write_lines(block, top, below)
    return block


def _write_lines(block: Image.Image, top: int, lines: Sequence[tuple[str, int, str]]) -> int:
    """Lines of (words, size, colour); returns where the next would be."""
    draw = ImageDraw.Draw(block)
    for words, size, colour in lines:
        draw.text((0, top), words, fill=colour, font=_font(size, words))
        top += size + LEADING
    return top


def _paste_cell(block: Image.Image, corner: tuple[int, int], picture: Image.Image, label: str, is_result: bool) -> None:
    """A picture under its label. The frame lies around it, so that none of its pixels is hidden."""
    draw, (left, top) = ImageDraw.Draw(block), corner
    draw.text((left, top), label, fill=ACCENT if is_result else FAINT, font=_font(LABEL_SIZE, label))
    top += LABEL_SIZE + LEADING
    block.paste(picture, (left, top))
    edge = FRAME if is_result else 1
    around = (left - edge, top - edge, left + picture.width + edge - 1, top + picture.height + edge - 1)
    draw.rectangle(around, outline=ACCENT if is_result else RULE, width=edge)


def _fitted(picture: Picture, cell: int) -> Image.Image:
    image = to_rgb(picture) if isinstance(picture, Image.Image) else open_image(picture)
    longest = max(image.size)
    if longest > cell:
        return image.resize((max(1, image.width * cell // longest), max(1, image.height * cell // longest)))
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of at most `width` px; a word that is longer (or a text without spaces) is cut wherever it must be."""
    font = _font(size, text)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            candidate = f"{line} {word}" if line else word
            if font.getlength(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = ""
            for letter in word:
                if line and font.getlength(line + letter) > width:
                    lines.append(line)
                    line = ""
                line += letter
        if line:
            lines.append(line)
        if len(lines) > MAX_LINES:
            return [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1].rstrip()[:-1]}…"]
    return lines


def _font(size: int, text: str) -> FreeTypeFont:
    return ImageFont.truetype(_font_file(any(ord(letter) >= _FIRST_CJK for letter in text)), size)


@cache
def _font_file(has_cjk: bool) -> str:
    """DejaVu Sans comes with matplotlib; other scripts need a font of the system."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import fontManager

    if has_cjk:
        by_name = {font.name: font.fname for font in fontManager.ttflist}
        if found := next((by_name[name] for name in _CJK_FONTS if name in by_name), None):
            return found
    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
