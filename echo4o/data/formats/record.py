"""One row of any data set on disk: texts and images as the data set holds them, nothing decoded or rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Text to image; references and a target; a source with its successive edits; a conversation about images.
RECORD_KINDS = ("t2i", "multi_ref", "edit", "vlm")


@dataclass(frozen=True)
class StoredImage:
    """An encoded image where it lies.

    Attributes:
        name: path as the data set names it; empty where the data set gives none (binary columns).
        read: the encoded bytes, never encoded anew. Raises RowError if it is missing or its archive is broken.
        path: a plain file on this machine that holds exactly these bytes, where there is one.
    """

    name: str
    read: Callable[[], bytes]
    path: Path | None = None


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        kind: one of RECORD_KINDS.
        instructions: exactly as given. A text, or a list of paraphrases. ``edit`` chains: a list with one entry (a text
            or a list of paraphrases) for every step. Upstream's multi-reference parquet: a list of lists. ``vlm``: the
            turns, as a list of mappings.
        references: images in front of the target, in order. ``edit`` chains: the source and all results but the last.
            ``vlm``: all images.
        target: the image to learn; ``None`` for ``vlm``.
        extra: the row's other fields as given (task_type, type, idx, scores, …).
        where: ``file:row``, for messages; rows count from 0 as everywhere else.
    """

    kind: str
    instructions: Any
    references: tuple[StoredImage, ...] = ()
    target: StoredImage | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def images(self) -> tuple[StoredImage, ...]:
        """All images in order; the target last."""
        return self.references if self.target is None else (*self.references, self.target)


def training_row(record: Record) -> dict[str, Any]:
    """The record in the column names that training understands; images as absolute paths or bytes.

    Raises:
        RowError: if the bytes of an image cannot be had.
    """
    references = [_value(image) for image in record.references]
    if record.kind == "vlm":
        return {"conversations": record.instructions, "image": references}
    target = None if record.target is None else _value(record.target)
    steps = record.instructions
    nested = isinstance(steps, list) and (record.kind == "edit" or any(isinstance(step, list) for step in steps))
    row = {"instruction_list" if nested else "instruction": steps, "input_images": references, "output_image": target}
    if record.kind == "t2i":
        row |= {"image": target, "captions": steps if isinstance(steps, list) else [steps]}
    return row


def _value(image: StoredImage) -> str | bytes:
    return image.read() if image.path is None else str(image.path)
