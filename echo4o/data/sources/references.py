"""How an instruction speaks of its references: ``<image>``, ``<image 2>``, "image 2", "the second image"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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

_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_HAN_NUMBERS = "一二三四五六七八九十"
_LABELS = "ABCDEFGHIJ"
#: Numbers that count or measure and name no reference: 512 px, 4k, 3D, "into one image".
_NO_REFERENCE = re.compile(r"\b\d+\s?px\b|\b\d+[kd]\b|\b(?<=into )one\b", re.IGNORECASE)
#: What may name a reference beside the mentions that are understood. Groups tell how its number is written.
_UNCLEAR = re.compile(
    rf"""
      (?P<digits>\d+)
    | \b(?P<word>{"|".join((*_ORDINALS, *_NUMBER_WORDS))})\b
    | \b(?:image|picture|photo|reference|subject|figure|object|person|character)s?\s+(?P<label>[A-J])\b
    | (?<![\w'])(?P<capital>(?-i:[B-HJ]|(?<=[a-z]\ )A))(?!\w)
    | (?P<han>[{_HAN_NUMBERS}])
    | \b(?P<end>last|latter|final|penultimate|other|both|respective(?:ly)?)\b | (?P<han_end>[两末后最])
    | \b(?P<relative>former|next|previous|following|preceding|another|(?:in|same|this|given)\ order)\b | (?P<front>前)
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

    Understood are ``<image>`` (in order), ``<image N>``, "image N", "images N, M and K", "the second image", "2nd
    image", "the last image" (also with picture, photo or reference instead of image) and 图N. Numbers beyond the
    references are left alone ("image 512"), and so are descriptions ("the left image").
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


def surely_renumbered(text: str, new_numbers: Sequence[int]) -> str | None:
    """`renumber`, or None where the text may name references in words that it does not understand.

    "the first image and the second one", "image A", "subject 1", "the latter": moving the references would silently
    make such a text wrong. The doubt goes far (any small number, "two cats"), since keeping the given order costs
    nothing. English and Chinese words are known; of other languages only digits.
    """
    text = number_placeholders(text)
    num_references = len(new_numbers)
    if any(not 1 <= number <= num_references for number in _mentioned(text, num_references)):
        return None
    largest = max(num_references, len(_NUMBER_WORDS))
    doubts = (number for number in _unclear(text, num_references) if number <= largest)
    return None if next(doubts, None) is not None else renumber(text, new_numbers)


def names_beyond(text: str, num_kept: int, num_references: int) -> bool:
    """Whether a text speaks, or may speak, of one of the references after the first `num_kept`."""
    text = number_placeholders(text)
    numbers = [*_mentioned(text, num_references), *_unclear(text, num_references)]
    return any(num_kept < number <= num_references for number in numbers)


def _mentioned(text: str, num_references: int) -> Iterator[int]:
    """Numbers of the references named in ways that `renumber` understands."""
    for match in _MENTION.finditer(text):
        kind = match.lastgroup or ""
        if kind == "ordinal":
            yield _ordinal_number(match[kind], num_references)
        else:
            yield from map(int, re.findall(r"\d+", match[kind]))


def _unclear(text: str, num_references: int) -> Iterator[int]:
    """Numbers outside of those mentions that may mean references; 0 where a word is relative ("the next one")."""
    remainder = _NO_REFERENCE.sub(" ", _MENTION.sub(" · ", text))
    for match in _UNCLEAR.finditer(remainder):
        kind = match.lastgroup or ""
        value = match[kind]
        lower = value.lower()
        if kind == "digits":
            yield int(value)
        elif kind == "word":
            yield (_ORDINALS if lower in _ORDINALS else _NUMBER_WORDS).index(lower) + 1
        elif kind in ("label", "capital"):
            yield _LABELS.index(value.upper()) + 1
        elif kind == "han":
            yield _HAN_NUMBERS.index(value) + 1
        else:
            yield num_references if kind in ("end", "han_end") else 0


def _ordinal_number(word: str, num_references: int) -> int:
    lower = word.lower()
    if lower == "last":
        return num_references
    if lower in _ORDINALS:
        return _ORDINALS.index(lower) + 1
    return int(re.match(r"\d+", lower)[0])  # type: ignore[index]


def _reordinal(word: str, new_numbers: Sequence[int]) -> str:
    old = _ordinal_number(word, len(new_numbers))
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
