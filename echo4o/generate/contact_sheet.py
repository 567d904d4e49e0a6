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
GAP, MARGIN = 12, 20
FONT_SIZE, LABEL_SIZE = 17, 13
BACKGROUND, INK, FAINT, ACCENT = "#ffffff", "#1d1d1f", "#6e6e73", "#0a66c2"
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
        references, results: pictures or their paths; results are framed.
        name: of the request, before the prompt.
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
    width = max(columns * (cell + GAP) - GAP, 2 * cell + GAP) + 2 * MARGIN
    blocks = [_block(row, width - 2 * MARGIN, cell) for row in rows]
    height = sum(block.height for block in blocks) + 2 * MARGIN * len(blocks)
    sheet = Image.new("RGB", (width, max(1, height)), BACKGROUND)
    top = MARGIN
    for number, block in enumerate(blocks):
        if number:
            ImageDraw.Draw(sheet).line((MARGIN, top - MARGIN, width - MARGIN, top - MARGIN), fill="#d2d2d7")
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
    font, label_font = _font(FONT_SIZE, row.prompt + row.name), _font(LABEL_SIZE, row.text)
    title = f"{row.name}   {row.prompt}" if row.name else row.prompt
    title_lines, text_lines = _wrapped(title, font, width), _wrapped(row.text, label_font, width)
    line, small = FONT_SIZE + 6, LABEL_SIZE + 6
    cells = [(picture, f"image {i}", False) for i, picture in enumerate(row.references, start=1)]
    labels = [*row.labels, *[""] * len(row.results)]
    cells += [(picture, labels[i] or "result", True) for i, picture in enumerate(row.results)]
    pictures = [(_fitted(picture, cell), label, is_result) for picture, label, is_result in cells]
    per_row = max(1, (width + GAP) // (cell + GAP))
    ranks = [pictures[i : i + per_row] for i in range(0, len(pictures), per_row)]
    heights = [max(picture.height for picture, _, _ in rank) + small + GAP for rank in ranks]
    height = len(title_lines) * line + GAP + sum(heights) + len(text_lines) * small
    block = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(block)
    top = 0
    for words in title_lines:
        draw.text((0, top), words, fill=INK, font=font)
        top += line
    top += GAP // 2
    for rank, rank_height in zip(ranks, heights, strict=True):
        for column, (picture, label, is_result) in enumerate(rank):
            left = column * (cell + GAP)
            draw.text((left, top), label, fill=ACCENT if is_result else FAINT, font=_font(LABEL_SIZE, label))
            block.paste(picture, (left, top + small))
            if is_result:
                right, bottom = left + picture.width - 1, top + small + picture.height - 1
                draw.rectangle((left, top + small, right, bottom), outline=ACCENT, width=2)
        top += rank_height
    for words in text_lines:
        draw.text((0, top), words, fill=FAINT, font=label_font)
        top += small
    return block


def _fitted(picture: Picture, cell: int) -> Image.Image:
    image = to_rgb(picture) if isinstance(picture, Image.Image) else open_image(picture)
    longest = max(image.size)
    if longest > cell:
        return image.resize((max(1, image.width * cell // longest), max(1, image.height * cell // longest)))
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` px; a word that is longer (or a text without spaces) is cut wherever it must be."""
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
