"""The texts of a record in the shapes that targets hold, checked before anything of the row is written."""

from __future__ import annotations

import json
from typing import Any

from echo4o.data.errors import RowError
from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import PartPlace
from echo4o.data.images import printable


def nested_instructions(record: Record, place: PartPlace) -> list[list[str]]:
    """Upstream's ``instruction_list``: for ``edit`` a list of phrasings for every step, otherwise one for the row.

    A text and a list that holds it alone give the same.

    Raises:
        RowError: if a text is missing, empty or no text, or an edit has fewer of them than steps.
    """
    given = record.instructions
    if isinstance(given, str):
        nested = [[given]]
    elif not isinstance(given, list) or not given:
        raise RowError("instruction missing", detail=f"the row holds {type(given).__name__}")
    elif record.kind == "edit" or any(isinstance(entry, list) for entry in given):
        nested = [list(entry) if isinstance(entry, list) else [entry] for entry in given]
    else:
        nested = [given]
    for phrases in nested:
        if not phrases:
            raise RowError("instruction missing", detail="empty list")
        for phrase in phrases:
            if not checked_text(phrase).strip():
                raise RowError("instruction missing", detail="empty text")
    if record.kind == "edit":
        steps = len(record.references)
        if not steps:
            raise RowError("too few images", detail="an edit needs a source and a result")
        if len(nested) < steps:
            raise RowError("instruction missing", detail=f"{len(nested)} instructions for {steps} edits")
        if len(nested) > steps:
            place.notes["instructions beyond the last edit left out"] += 1
            nested = nested[:steps]
    if any(len(phrases) > 1 for phrases in nested) and place.phrasings == "first":
        place.notes["more phrasings left out (--phrasings first)"] += 1
        nested = [phrases[:1] for phrases in nested]
    return nested


def plain_instructions(nested: list[list[str]], kind: str) -> tuple[str, Any]:
    """The shortest way of our JSONL to say the same, and the column it stands in: a text where there is one."""
    if kind == "edit" and all(len(phrases) == 1 for phrases in nested):
        texts = [phrases[0] for phrases in nested]
        return "instruction", texts[0] if len(texts) == 1 else texts
    if kind != "edit" and len(nested) == 1:
        return "instruction", nested[0][0] if len(nested[0]) == 1 else nested[0]
    return "instruction_list", nested


def one_text(phrases: list[str], place: PartPlace) -> str:
    """For targets with room for one text: the first phrasing."""
    if len(phrases) > 1:
        place.notes["only the first phrasing kept: the target holds one text"] += 1
    return phrases[0]


def captions_of(record: Record, place: PartPlace) -> list[str]:
    """Captions of a text-to-image row; the list may be empty, and so may be a caption.

    Raises:
        RowError: if one is no text.
    """
    given = record.instructions
    captions = [checked_text(caption) for caption in ([given] if isinstance(given, str) else given or [])]
    if len(captions) > 1 and place.phrasings == "first":
        place.notes["more phrasings left out (--phrasings first)"] += 1
        return captions[:1]
    return captions


def captions_json(captions: list[str]) -> str:
    """Upstream's ``captions``: the text of a JSON object."""
    names = ["caption"] if len(captions) == 1 else [f"caption_{number}" for number in range(len(captions))]
    return json.dumps(dict(zip(names, captions, strict=True)), ensure_ascii=False)


def given_captions_json(record: Record) -> str | None:
    """The text of the JSON object that the row came with, if it did and names its captions in a way of its own."""
    given = record.extra.get("captions")
    texts = record.instructions if isinstance(record.instructions, list) else [record.instructions]
    if not isinstance(given, str) or not all(isinstance(text, str) for text in texts):
        return None
    return None if given == captions_json(texts) else checked_text(given)


def checked_text(text: Any) -> str:
    """Raises RowError if it is no text, or one that UTF-8 cannot hold."""
    if text is None:
        raise RowError("instruction missing")
    if not isinstance(text, str):
        raise RowError("wrong column type", detail=f"an instruction is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("text is not Unicode", detail=f"lone surrogate in {printable(text[:80])}") from error
    return text
