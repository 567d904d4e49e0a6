"""Reads a judge's reply: tolerant of its dress, never of its content.

JSON in prose or fences, labels with markdown, ``8/10``, ``"8"`` and ``[8]`` are all 8. Two different readings, a range,
a number outside the scale or of another scale are no answer: `ParseError`, never a guess.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
# "8 / 10", "8 out of 10"
_OUT_OF = re.compile(r"\s*(?:/|out\s+of\b)\s*([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
# What makes "8" part of something else: 8%, 8.5.1, 8,5, 8th, 8-9, 8 to 9, 8 or 9, 8±1.
_NOT_ALONE = re.compile(r"[%\w]|\.[0-9]|,[0-9]|\s*(?:[-–—~/±]|\b(?:to|or)\b|\+/-)\s*[-+]?[0-9]", re.IGNORECASE)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_INNER_NAMES = ("score", "rating", "value")


class ParseError(ValueError):
    """The reply holds no answer, or not exactly one; the message names what was found."""


@dataclass(frozen=True)
class Number:
    """A number of the answer.

    Attributes:
        name: its key in the answer.
        low, high: bounds, both included.
        integer: 7.5 is no answer then; 7.0 is.
        aliases: other spellings a judge may use; case, spaces and punctuation never matter.
        about: description in the schema.
    """

    name: str
    low: float
    high: float
    integer: bool = False
    aliases: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Text:
    """A text of the answer, for the reader of the report; a reply without it is fine and gives ""."""

    name: str
    aliases: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Answer:
    """What a reply holds, in the order it is asked for.

    Attributes:
        bare: a reply that is one number and nothing else is accepted; for answers with one `Number`.
    """

    fields: tuple[Number | Text, ...]
    bare: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema, strict: every key required, no others."""
        return {
            "type": "object",
            "properties": {part.name: _schema(part) for part in self.fields},
            "required": [part.name for part in self.fields],
            "additionalProperties": False,
        }

    def parse(self, text: str, truncated: bool = False) -> dict[str, Any]:
        """The answer in a reply: name → number or text.

        Args:
            truncated: the reply was cut at `max_tokens`, so that a number at its very end may lack digits.

        Raises:
            ParseError: if a number is missing, out of range, or not the only one of its name.
        """
        spoken = _THOUGHT.sub(" ", text)
        objects, rest = _objects(spoken)
        answer: dict[str, Any] = {}
        for part in self.fields:
            if isinstance(part, Text):
                answer[part.name] = _text(part, objects, rest)
            else:
                answer[part.name] = self._number(part, objects, rest, text, truncated)
        return answer

    def _number(self, part: Number, objects: list[dict], rest: str, text: str, truncated: bool) -> int | float:
        readings = [_value(part, value) for value in _values(part, objects)]
        readings += list(_labelled(part, rest, truncated))
        if not readings and self.bare and sum(isinstance(f, Number) for f in self.fields) == 1:
            readings = _alone(part, rest, truncated)
        if not readings:
            raise ParseError(f"no {part.name} in {_shown(text)}")
        if len(set(readings)) > 1:
            found = ", ".join(str(reading) for reading in dict.fromkeys(readings))
            raise ParseError(f"{part.name} is ambiguous, found {found} in {_shown(text)}")
        return readings[0]


def _schema(part: Number | Text) -> dict[str, Any]:
    about = {"description": part.about} if part.about else {}
    if isinstance(part, Text):
        return {"type": "string"} | about
    if part.integer and (part.low, part.high) == (0, 1):
        return {"type": "integer", "enum": [0, 1]} | about
    return {"type": "integer" if part.integer else "number", "minimum": part.low, "maximum": part.high} | about


def _objects(text: str) -> tuple[list[dict], str]:
    """Every JSON object of the text, outermost ones, and the text without them."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_constant=_no_constant, strict=False)
    objects, rest, start = [], [], 0
    at = text.find("{")
    tries = 0
    while at >= 0 and tries < 200:  # of a reply full of braces the first few hundred are enough
        tries += 1
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError, too
            at = text.find("{", at + 1)
            continue
        objects.append(found)
        rest.append(text[start:at])
        start, at = end, text.find("{", end)
    return objects, "\n".join([*rest, text[start:]])


class _Twice(dict):
    """An object with a key that occurs twice: all its pairs are kept."""

    pairs: list[tuple[str, Any]]


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    found = _Twice(pairs)
    found.pairs = pairs
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _values(part: Number | Text, objects: list[dict]) -> Iterator[Any]:
    """Values under the part's names in the objects, and in objects inside them."""
    names = {_plain(name) for name in (part.name, *part.aliases)}
    waiting: list[Any] = list(reversed(objects))
    while waiting:
        current = waiting.pop()
        for key, value in current.pairs if isinstance(current, _Twice) else ():
            if _plain(key) in names:
                yield value
            elif isinstance(value, dict):
                waiting.append(value)


def _plain(name: str) -> str:
    """``**Identity Preservation** (0-10)`` → ``identitypreservation``."""
    return re.sub(r"[\W_]", "", re.sub(r"\([^)]*\)", "", name)).lower()


def _value(part: Number, value: Any) -> int | float:
    """The number that a JSON value stands for."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        inner = [v for k, v in getattr(value, "pairs", ()) if _plain(k) in _INNER_NAMES]
        value = inner[0] if len(inner) == 1 else value
    if isinstance(value, bool) and part.integer and (part.low, part.high) == (0, 1):
        return int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _in_range(part, value)
    if isinstance(value, str):
        readings = _alone(part, value, truncated=False)
        if readings:
            return readings[0]
    raise ParseError(f"{part.name} is {_shown(value)}, not a number of {_scale(part)}")


def _labelled(part: Number, text: str, truncated: bool) -> Iterator[int | float]:
    """Numbers behind the part's name: ``Name: 8``, ``**Name** (0-10) = 8/10``, ``"name": "8"``, ``| Name | 8 |``."""
    for match in _label(part).finditer(text):
        number = re.compile(rf"[\s*_`\"'\[<(]*({_NUMBER})").match(text, match.end())
        if number is None:
            continue
        if match.group("separator") is None and not re.match(r"[\s*_`/.0-9]*$", text[number.end() :].split("\n")[0]):
            continue  # without a colon only a line of its own counts: "score 3 points lower" is prose
        yield _read(part, number.group(1), text[number.end() :], truncated)


def _label(part: Number | Text) -> re.Pattern[str]:
    """The part's name at the start of a line, or behind a comma, brace or pipe; then perhaps a colon."""
    names = sorted((part.name, *part.aliases), key=len, reverse=True)
    spelt = "|".join(r"[\s_-]*".join(map(re.escape, re.findall(r"[^\W_]+", name))) for name in names)
    return re.compile(
        r"(?:^[\s>#*_`\"'+•-]*(?:[0-9]{1,2}[.)][\s*_`\"']*)?|[{,;|][\s*_`\"']*)"
        rf"(?:{spelt})(?![^\W_])[*_`\"']*(?:[^\S\n]*\([^)\n]{{0,40}}\))?[^\S\n*_`\"']*[*_`\"']*"
        r"[^\S\n]*(?P<separator>[:=：|])?",
        re.IGNORECASE | re.MULTILINE,
    )


def _alone(part: Number, text: str, truncated: bool) -> list[int | float]:
    """The number that is all of the text but decoration, or nothing."""
    bare = re.sub(r"```\w*", " ", text).strip(" \t\r\n*_`\"'[]<>()")
    match = re.match(_NUMBER, bare)
    if match is None:
        return []
    tail = bare[match.end() :]
    out_of = _OUT_OF.match(tail)
    if (tail[out_of.end() :] if out_of else tail).strip(" \n.*_`"):
        return []
    return [_read(part, match.group(0), tail, truncated)]


def _read(part: Number, digits: str, tail: str, truncated: bool) -> int | float:
    """The number written as `digits` and followed by `tail`.

    Raises:
        ParseError: if it is cut off, part of a range or of another number, or of another scale.
    """
    out_of = _OUT_OF.match(tail)
    if out_of:
        if float(out_of.group(1)) != part.high:
            raise ParseError(f"{part.name} is {digits}{out_of.group(0)}, not of {_scale(part)}")
        tail = tail[out_of.end() :]
    if _NOT_ALONE.match(tail):
        raise ParseError(f"{part.name} is {_shown(digits + tail[:20])}, not one number of {_scale(part)}")
    if truncated and not tail.strip(" *_`"):
        raise ParseError(f"{part.name} is {digits} where the reply was cut off")
    number = float(digits)
    if number.is_integer() and abs(number) < 1e15:
        return _in_range(part, int(number))
    return _in_range(part, number)


def _in_range(part: Number, number: int | float) -> int | float:
    if not part.low <= number <= part.high or not math.isfinite(number):
        raise ParseError(f"{part.name} is {_shown(number)}, outside {_scale(part)}")
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if part.integer and not isinstance(number, int):
        raise ParseError(f"{part.name} is {number}, not a whole number of {_scale(part)}")
    return number


def _text(part: Text, objects: list[dict], rest: str) -> str:
    for value in _values(part, objects):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    match = _label(part).search(rest)
    if match is None or match.group("separator") is None:
        return ""
    return rest[match.end() :].split("\n")[0].strip(" \t*_`\"'}")


def _scale(part: Number) -> str:
    return f"{part.low:g} to {part.high:g}"


def _shown(value: Any) -> str:
    """At most 120 characters of it, quoted."""
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # digits beyond Python's limit for printing
        text = "a number of thousands of digits"
    return repr(text if len(text) <= 120 else f"{text[:120]}…")
