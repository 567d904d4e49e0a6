"""Rows that name images and a text: the one parser of all formats whose rows differ in little but names.

Names are understood as in training (echo4o/data/sources/columns.py): ``input_images|input_image|image_list|images``,
``output_image|target_image|output``, ``instruction|prompt|text``, ``conversations``. A mapping replaces them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.finder import ImageFinder
from echo4o.data.formats.record import Record
from echo4o.data.sources.columns import (
    IMAGE_LIST,
    INPUT_IMAGES,
    INSTRUCTION,
    OUTPUT_IMAGE,
    as_list,
    columns_found,
    first_of,
)

_CAPTIONS = ("captions", "caption")
_CONVERSATIONS = ("conversations",)
#: What a mapping of columns may name.
OUR_COLUMNS = ("instruction", "input_images", "output_image", "conversations", "captions")


@dataclass(frozen=True)
class FieldParser:
    """Reads rows by column names.

    Args:
        finder: of the images that rows name.
        columns: our name → the data set's, or for images a list of the data set's columns, in order.
        only_kind: the only kind of row, where the format has one.
        single_is_edit: rows with one reference are edits of it, whatever their task_type.
    """

    finder: ImageFinder
    columns: Mapping[str, Any] = field(default_factory=dict)
    only_kind: str = ""
    single_is_edit: bool = False

    def __post_init__(self) -> None:
        for name, theirs in self.columns.items():
            if name not in OUR_COLUMNS:
                raise DataError(f"columns maps {name!r}; it can map {', '.join(OUR_COLUMNS)}")
            if not isinstance(theirs, str) and not (
                isinstance(theirs, list) and theirs and all(isinstance(column, str) for column in theirs)
            ):
                raise DataError(f"columns.{name} must be the name of a column, or a list of names, not {theirs!r}")

    def kind(self, values: Mapping[str, Any]) -> str:
        """Raises RowError if the row has neither images nor a conversation."""
        if self.only_kind:
            return self.only_kind
        if self._first(values, "conversations", _CONVERSATIONS)[1] is not None:
            return "vlm"
        return self._kind_of(values, *self.images(values)[:2])

    def record(self, values: Mapping[str, Any], where: str, folder: Path) -> Record:
        """Raises RowError if a column has a wrong type or the target is missing; images are looked up, not read."""
        used, turns = self._first(values, "conversations", _CONVERSATIONS)
        if turns is not None:
            names, images = self._first(values, "input_images", ("image", "images"))
            references = tuple(self.finder(image, folder) for image in ([] if images is None else as_list(images)))
            return Record("vlm", turns, references, None, _rest(values, (*used, *names)), where)
        references, target, image_columns = self.images(values)
        text_columns, instructions, extra = self._text(values, has_references=bool(references))
        return Record(
            self._kind_of(values, references, target),
            instructions,
            tuple(self.finder(image, folder) for image in references),
            self.finder(target, folder),
            {**_rest(values, (*image_columns, *text_columns)), **extra},
            where,
        )

    def _kind_of(self, values: Mapping[str, Any], references: list[Any], target: Any) -> str:
        if target is None:
            raise RowError("no images", detail=columns_found(values))
        if self.only_kind or not references:
            return self.only_kind or "t2i"
        is_edit = "edit" in str(values.get("task_type") or "").lower()
        if len(references) == 1:
            return "edit" if is_edit or self.single_is_edit else "multi_ref"
        # A chain of edits has an instruction for every step; an edit with several references has one.
        steps = self._first(values, "instruction", INSTRUCTION)[1] if is_edit else None
        return "edit" if isinstance(steps, list) and len(steps) == len(references) else "multi_ref"

    def images(self, values: Mapping[str, Any]) -> tuple[list[Any], Any, tuple[str, ...]]:
        """References in order, the target (``None`` if there is none), and the columns that hold them."""
        names, target = self._first(values, "output_image", OUTPUT_IMAGE)
        aliases = INPUT_IMAGES if target is not None else IMAGE_LIST
        more, images = self._first(values, "input_images", aliases)
        images = [] if images is None else [image for image in as_list(images) if image is not None and image != ""]
        if isinstance(target, list | tuple):
            if len(target) != 1:
                raise RowError(
                    "wrong column type", detail=f"{names[0]} holds {len(target)} images; a row has one target"
                )
            target = target[0]
        elif target is None and images:
            *images, target = images
        return images, target, (*names, *more)

    def _text(self, values: Mapping[str, Any], *, has_references: bool) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        """Columns that hold the text, the text as given, and what else must be kept of it."""
        names, text = self._first(values, "captions", _CAPTIONS)
        if text is not None and not has_references:
            if isinstance(text, str) and names[0] == "captions":
                try:
                    parsed = json.loads(text)
                except ValueError as error:
                    raise RowError("invalid json", detail=f"captions: {error}") from error
                choices = list(parsed.values()) if isinstance(parsed, Mapping) else as_list(parsed)
                return names, choices, {names[0]: text}
            return names, list(text.values()) if isinstance(text, Mapping) else text, {}
        names, text = self._first(values, "instruction", INSTRUCTION)
        if text is None:
            raise RowError("instruction missing", detail=columns_found(values))
        if not isinstance(text, str | list | tuple):
            raise RowError("wrong column type", detail=f"{names[0]} is {type(text).__name__}, not text")
        return names, list(text) if isinstance(text, tuple) else text, {}

    def _first(self, values: Mapping[str, Any], ours: str, aliases: Sequence[str]) -> tuple[tuple[str, ...], Any]:
        """Columns used and their value; several mapped columns give one list in their order."""
        mapped = self.columns.get(ours)
        if isinstance(mapped, list):
            found = [entry for name in mapped if values.get(name) is not None for entry in as_list(values[name])]
            return tuple(mapped), found or None
        if mapped is not None:
            if mapped not in values:
                raise RowError("column missing", detail=f"{mapped}; {columns_found(values)}")
            return (mapped,), values[mapped]
        if self.columns:
            taken = {name for theirs in self.columns.values() for name in as_list(theirs)}
            aliases = [alias for alias in aliases if alias not in taken]
        name, value = first_of(values, aliases)
        return ((name,) if name else (), value)


def _rest(values: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in used}
