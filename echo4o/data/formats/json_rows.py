"""Rows of files that are one JSON value: an array of rows, an object of rows, or a single row. JSONL is read too."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from echo4o.data.errors import DataError
from echo4o.data.sources.jsonl import JsonlRows, line_spans

_log = logging.getLogger(__name__)
_SPACE = " \t\r\n"


class JsonRows(JsonlRows):
    """Random access to the rows of JSON and JSONL files, by byte offset as for JSONL.

    A file that breaks off gives the rows before the break; `problems` names it.
    """

    problems: list[str]

    def _row_spans(self, path: Path) -> np.ndarray:
        if "problems" not in self.__dict__:
            self.problems = []
        if _is_lines(path):
            return line_spans(path)
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv -t utf-8"
            ) from error
        spans, fault = value_spans(text)
        if fault:
            self.problems.append(f"{path}: {fault}; {len(spans)} rows before it are usable")
            _log.warning("%s", self.problems[-1])
        return _bytes_of(text, spans)


def value_spans(text: str) -> tuple[list[tuple[int, int]], str]:
    """Start and end (characters) of every row in a JSON text, and where and how it breaks off ("" if it does not).

    An object whose values are all objects or arrays of rows is an object of rows; another object is one row.
    """
    scan = json.JSONDecoder().raw_decode
    place = _skip(text, 1 if text.startswith("\ufeff") else 0)
    start, spans = place, []
    opening = text[place : place + 1]
    if opening not in ("[", "{"):
        return [], "no JSON array or object"
    closing = "]" if opening == "[" else "}"
    place = _skip(text, place + 1)
    try:
        while text[place] != closing:
            if opening == "{":
                _, place = scan(text, place)
                place = _skip(text, place)
                if text[place] != ":":
                    return spans, f"no JSON at character {place}"
                place = _skip(text, place + 1)
            value, end = scan(text, place)
            if opening == "{" and not isinstance(value, dict):
                _, end = scan(text, start)
                return [(start, end)], ""
            spans.append((place, end))
            place = _skip(text, end)
            if text[place] == ",":
                place = _skip(text, place + 1)
            elif text[place] != closing:
                return spans, f"no JSON at character {place}"
    except (ValueError, IndexError, RecursionError) as error:
        return spans, f"the JSON breaks off ({error})"
    return spans, ""


def _skip(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in _SPACE:
        place += 1
    return place


def _bytes_of(text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """(N, 2) int64 byte offsets of character spans in UTF-8."""
    if text.isascii():
        return np.array(spans, dtype=np.int64).reshape(len(spans), 2)
    offset, place, found = 0, 0, []
    for start, end in spans:
        offset += len(text[place:start].encode())
        length = len(text[start:end].encode())
        found.append((offset, offset + length))
        offset, place = offset + length, end
    return np.array(found, dtype=np.int64).reshape(len(found), 2)


def _is_lines(path: Path) -> bool:
    """Whether the file is JSONL: its first line is a whole object, and more follows or its name says so."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    stripped = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if stripped.startswith(b"["):
        return False
    if path.suffix.lower() == ".jsonl":
        return True
    line, _, rest = stripped.partition(b"\n")
    try:
        json.loads(line)
    except ValueError:
        return False
    return rest.lstrip().startswith(b"{")
