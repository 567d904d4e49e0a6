"""How an instruction speaks of its references: ``<image>``, ``<image 2>``, "image 2", "the second image"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from echo4o.data.errors import RowError

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NOUN = r"(?:reference\s+)?(?:image|picture|photo|reference)"

_PLACEHOLDER = re.compile(r"<image(?:[\s_]*(\d+))?>", re.IGNORECASE)
_MENTION = re.compile(
    rf"""
      <image[\s_]*(?P<tag>\d+)>
    | \b{_NOUN}s\s+(?P<list>\#?\d+(?:\s*(?:,\s*(?:and\s+|or\s+)?|and\s+|or\s+|&\s*)\#?\d+)+)\b
    | \b{_NOUN}[\s_]*\#?(?P<number>\d+)\b
    | \b(?P<ordinal>{"|".join(_ORDINALS)}|last|\d+(?:st|nd|rd|th))(?=\s+{_NOUN}\b)
    | 图(?:片|像)?\s*(?P<han>\d+)
    """,
    re.IGNORECASE | re.VERBOSE,
)


def number_placeholders(text: str) -> str:
    """Give every bare ``<image>`` its number, so that it keeps its meaning when references move."""
    count = 0

    def numbered(match: re.Match[str]) -> str:
        nonlocal count
        if match[1]:
            return match[0]
        count += 1
        return f"<image {count}>"

    return _PLACEHOLDER.sub(numbered, text)


def renumber(text: str, new_numbers: Sequence[int]) -> str:
    """Rewrite every mention of reference i (from 1) to ``new_numbers[i − 1]``.

    Understood are ``<image N>``, "image N", "images N, M and K", "the second image", "2nd image", "the last image"
    (also with picture, photo or reference instead of image) and 图N. Numbers beyond the references are left alone
    ("image 512"), and so are descriptions ("the left image").
    """

    def new(number: str | int) -> str:
        index = int(number) - 1
        return str(new_numbers[index]) if 0 <= index < len(new_numbers) else str(number)

    def rewritten(match: re.Match[str]) -> str:
        kind = match.lastgroup or ""
        value = match[kind]
        if kind == "ordinal":
            return _reordinal(value, new_numbers)
        place = match.start(kind) - match.start()
        changed = re.sub(r"\d+", lambda number: new(number[0]), value)
        return match[0][:place] + changed + match[0][place + len(value) :]

    return _MENTION.sub(rewritten, number_placeholders(text))


def _reordinal(word: str, new_numbers: Sequence[int]) -> str:
    lower = word.lower()
    if lower == "last":
        old = len(new_numbers)
    elif lower in _ORDINALS:
        old = _ORDINALS.index(lower) + 1
    else:
        old = int(re.match(r"\d+", lower)[0])  # type: ignore[index]
    if not 1 <= old <= len(new_numbers):
        return word
    new = new_numbers[old - 1]
    ordinal = _ORDINALS[new - 1] if new <= len(_ORDINALS) else f"{new}th"
    return ordinal.capitalize() if word[0].isupper() else ordinal


def split_inline(text: str, num_references: int) -> list[str | int]:
    """Cut an instruction at its placeholders into texts and reference indices (from 0), in sequence order.

    ``<image>`` is the next reference in order, ``<image N>`` the N-th. A reference stands where it is first mentioned;
    a later mention stays in the text. References without a placeholder come first, in order. Texts are trimmed, empty
    ones left out.

    Raises:
        RowError: if a placeholder has no reference.
    """
    text = number_placeholders(text)
    parts: list[str | int] = []
    placed: set[int] = set()
    start = 0
    for match in _PLACEHOLDER.finditer(text):
        reference = int(match[1]) - 1
        if not 0 <= reference < num_references:
            raise RowError("placeholder without image", detail=f"{match[0]} in a row of {num_references} references")
        if reference in placed:
            continue
        placed.add(reference)
        parts += [text[start : match.start()].strip(), reference]
        start = match.end()
    parts.append(text[start:].strip())
    unmentioned = [reference for reference in range(num_references) if reference not in placed]
    return [*unmentioned, *(part for part in parts if part != "")]
