"""To OmniGen2's training data: JSONL with absolute paths (its loader opens them as they stand) and a YAML mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import CannotHold, Finishing, KindSummary, PartPlace, Target
from echo4o.data.formats.writers.dataset_yaml import write_dataset_yaml
from echo4o.data.formats.writers.image_files import ImageFiles
from echo4o.data.formats.writers.json_lines import LinesPart, join_lines
from echo4o.data.formats.writers.texts import captions_of, checked_text, nested_instructions, one_text

#: Kind of row → OmniGen2's task and the name of its JSONL.
TASKS = {"t2i": "t2i", "edit": "edit", "multi_ref": "ic"}
#: Its max_input_pixels has an entry for so many references; a row with more is drawn in vain.
MAX_REFERENCES = 4
_COLUMNS = ("task_type", "instruction", "input_images", "output_image")


class OmniGen2Part:
    """Lines and images of one part."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._lines = LinesPart(place)
        self._images = ImageFiles(place)

    def add(self, record: Record, images: Sequence[bytes], row: int) -> None:
        texts = self._texts(record)
        extra = self._extra(record)
        names = [self._images.store(image, content) for image, content in zip(record.images, images, strict=True)]
        paths = [str(self._place.final / name) for name in names]
        task = {"task_type": self._task(record)}
        if record.kind == "edit":
            if len(texts) > 1:
                self._place.notes["chains of edits: a row for every step"] += 1
            self._lines.add(
                record,
                *(
                    {**task, "instruction": text, "input_images": [source], "output_image": result, **extra}
                    for text, source, result in zip(texts, paths[:-1], paths[1:], strict=True)
                ),
            )
            return
        references = {"input_images": paths[:-1]} if paths[:-1] else {}
        if len(paths) - 1 > MAX_REFERENCES:
            self._place.notes[
                f"more than {MAX_REFERENCES} references: raise max_input_pixels of OmniGen2 for them"
            ] += 1
        self._lines.add(record, {**task, "instruction": texts[0], **references, "output_image": paths[-1], **extra})

    def close(self) -> dict[str, KindSummary]:
        return self._lines.close()

    def settle(self) -> None:
        self._images.sync()
        self._lines.settle()

    def _texts(self, record: Record) -> list[str]:
        if record.kind == "edit":
            nested = nested_instructions(record, self._place)
            return [one_text(phrases, self._place) for phrases in nested]
        if record.kind == "multi_ref":
            return [one_text(nested_instructions(record, self._place)[0], self._place)]
        captions = captions_of(record, self._place)
        if not captions:
            raise CannotHold("no caption", detail="the target needs a text")
        return [one_text(captions, self._place)]

    @staticmethod
    def _task(record: Record) -> str:
        """The row's own name for its task, unless it says the opposite of what the row is."""
        given = record.extra.get("task_type")
        if isinstance(given, str) and given:
            is_t2i = "t2i" in given or "text_to_image" in given
            if is_t2i == (record.kind == "t2i") and ("edit" in given.lower()) == (record.kind == "edit"):
                return given
        return TASKS[record.kind]

    def _extra(self, record: Record) -> dict[str, str]:
        """Texts alone: OmniGen2 joins all files into one table, in which a column has one type."""
        kept: dict[str, str] = {}
        for name, value in record.extra.items():
            if name in ("task_type", "captions"):
                continue
            if isinstance(value, str) and name not in _COLUMNS:
                kept[name] = checked_text(value)
            elif value is not None:
                self._place.notes[f"field {name} left out: only texts are kept"] += 1
        return kept


def finish(finishing: Finishing) -> None:
    """``jsonls/t2i.jsonl``, ``edit.jsonl``, ``ic.jsonl``; ``mix.yml``, which names them; the dataset YAML."""
    total = sum(summary.rows for summary in finishing.kinds.values())
    entries: list[dict[str, Any]] = []
    for kind, summary in finishing.kinds.items():
        name = f"jsonls/{TASKS[kind]}.jsonl"
        join_lines(finishing, kind, name)
        entries.append(
            {"path": str(finishing.final / name), "type": TASKS[kind], "ratio": round(summary.rows / total, 6)}
        )
    finishing.write("mix.yml", yaml.safe_dump({"data": entries}, sort_keys=False, allow_unicode=True))
    write_dataset_yaml(
        finishing,
        {kind: {"data_dir": ".", "jsonl_path": f"jsonls/{TASKS[kind]}.jsonl"} for kind in finishing.kinds},
    )


TARGET = Target(
    "omnigen2",
    "OmniGen2's JSONL (t2i, edit, ic) with absolute paths, images/ and mix.yml",
    ("t2i", "edit", "multi_ref"),
    OmniGen2Part,
    finish,
)
