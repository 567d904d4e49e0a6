"""To this project's own JSONL: a file for each kind of row, the images beside it, everything else of the row kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import CannotHold, Finishing, KindSummary, PartPlace, Target
from echo4o.data.formats.writers.dataset_yaml import write_dataset_yaml
from echo4o.data.formats.writers.image_files import ImageFiles
from echo4o.data.formats.writers.json_lines import LinesPart, join_lines
from echo4o.data.formats.writers.texts import (
    captions_of,
    checked_text,
    given_captions_json,
    nested_instructions,
    plain_instructions,
)

#: Columns that readers would take for the row's own text or images.
_RESERVED = ("instruction", "instruction_list", "input_images", "output_image", "conversations", "image", "images")


class NativePart:
    """Lines and images of one part."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._lines = LinesPart(place)
        self._images = ImageFiles(place)

    def add(self, record: Record, images: Sequence[bytes], row: int) -> None:
        if record.extra.get("video"):
            raise CannotHold("video", detail="videos are not converted")
        texts = self._texts(record)
        extra = self._extra(record, texts)
        names = [self._images.store(image, content) for image, content in zip(record.images, images, strict=True)]
        if record.kind == "vlm":
            pictures = {"image": names[0] if len(names) == 1 else names} if names else {}
            self._lines.add(record, {**texts, **pictures, **extra})
        else:
            self._lines.add(record, {**texts, "input_images": names[:-1], "output_image": names[-1], **extra})

    def close(self) -> dict[str, KindSummary]:
        return self._lines.close()

    def settle(self) -> None:
        self._images.sync()
        self._lines.settle()

    def _texts(self, record: Record) -> dict[str, Any]:
        if record.kind == "vlm":
            checked_text(json.dumps(record.instructions, ensure_ascii=False))
            return {"conversations": record.instructions}
        if record.kind != "t2i":
            name, text = plain_instructions(nested_instructions(record, self._place), record.kind)
            return {name: text}
        captions = captions_of(record, self._place)
        given = given_captions_json(record) if self._place.phrasings == "all" else None
        if given is not None or not captions:
            return {"captions": given or "{}"}
        # A row may have an instruction beside its caption: both keep their names.
        name = "caption" if "instruction" in record.extra else "instruction"
        return {name: captions[0] if len(captions) == 1 else captions}

    def _extra(self, record: Record, texts: Mapping[str, Any]) -> dict[str, Any]:
        """Other fields of the row, as far as JSON holds them and readers do not take them for something else."""
        kept: dict[str, Any] = {}
        for name, value in record.extra.items():
            if name in texts or (name == "captions" and record.kind == "t2i"):
                continue
            if not self._may_stand(name, record, texts):
                self._place.notes[f"field {name} left out: it would be read as the row's own"] += 1
                continue
            try:
                checked_text(json.dumps({name: value}, ensure_ascii=False))
            except (TypeError, ValueError):  # RowError is a ValueError
                self._place.notes[f"field {name} left out: JSON cannot hold it"] += 1
                continue
            kept[name] = value
        if record.kind == "edit" and "edit" not in str(kept.get("task_type") or "").lower():
            if kept.get("task_type"):
                self._place.notes["task_type replaced by 'edit', by which edits are known"] += 1
            kept["task_type"] = "edit"
        return kept

    @staticmethod
    def _may_stand(name: str, record: Record, texts: Mapping[str, Any]) -> bool:
        if record.kind == "t2i" and name in ("instruction", "caption"):
            return "captions" in texts or (name == "instruction" and "caption" in texts)
        return name not in _RESERVED


def finish(finishing: Finishing) -> None:
    """``multi_ref.jsonl``, ``edit.jsonl``, … and the dataset YAML."""
    for kind in finishing.kinds:
        join_lines(finishing, kind, f"{kind}.jsonl")
    write_dataset_yaml(finishing, {kind: {"data_dir": ".", "jsonl_path": f"{kind}.jsonl"} for kind in finishing.kinds})


TARGET = Target(
    "native",
    "this project's JSONL, a file for each kind of row, with images/ and dataset.yaml",
    ("multi_ref", "edit", "t2i", "vlm"),
    NativePart,
    finish,
)
