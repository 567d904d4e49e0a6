"""To upstream BAGEL's parquet: a folder for each kind of row, columns exactly as upstream reads them.

Image columns are neither compressed nor given dictionaries or statistics: they are compressed already.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import GROUP_OF_KIND, Finishing, KindSummary, PartPlace, Target
from echo4o.data.formats.writers.dataset_yaml import write_dataset_yaml
from echo4o.data.formats.writers.texts import captions_json, captions_of, given_captions_json, nested_instructions

ROWS_PER_GROUP = 64
#: Row groups are read whole: rows with large images make smaller ones.
BYTES_PER_GROUP = 64 << 20

_LISTS = pa.schema(
    [("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))],
)
_SCHEMAS = {
    "multi_ref": _LISTS,
    "edit": _LISTS,
    "t2i": pa.schema([("image", pa.binary()), ("captions", pa.string())]),
}
_TEXT_COLUMNS = {"instruction_list.list.element.list.element": "snappy", "captions": "snappy"}
_IMAGE_COLUMNS = {"image_list.list.element": "none", "image": "none"}


class ParquetPart:
    """One file for each kind of row in the part."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._files: dict[str, _KindFile] = {}

    def add(self, record: Record, images: Sequence[bytes], row: int) -> None:
        if record.kind == "t2i":
            captions = captions_of(record, self._place)
            given = given_captions_json(record) if self._place.phrasings == "all" else None
            values = {"image": images[-1], "captions": given or captions_json(captions)}
        else:
            nested = nested_instructions(record, self._place)
            if record.kind == "multi_ref" and len(nested[0]) > 1:
                self._place.notes[
                    "several phrasings: upstream BAGEL skips such rows (--phrasings first keeps one)"
                ] += 1
            values = {"image_list": images, "instruction_list": nested}
        for name in record.extra:
            if name != "captions" or record.kind != "t2i":
                self._place.notes[f"field {name} left out: the target has no column for it"] += 1
        if record.kind not in self._files:
            self._files[record.kind] = _KindFile(record.kind, self._place)
        self._files[record.kind].add(record, values, sum(map(len, images)))

    def close(self) -> dict[str, KindSummary]:
        return {kind: file.close() for kind, file in self._files.items()}

    def settle(self) -> None:
        for file in self._files.values():
            file.settle()


class _KindFile:
    """A parquet file under a temporary name until it is closed."""

    def __init__(self, kind: str, place: PartPlace) -> None:
        self._place = place
        self._name = f"{GROUP_OF_KIND[kind]}/part-{place.index:05d}.parquet"
        self._schema = _SCHEMAS[kind]
        self._unfinished = place.temporary(f"{kind}.parquet")
        leaves = _leaf_columns(self._schema)
        self._writer = pq.ParquetWriter(
            self._unfinished,
            self._schema,
            compression={name: {**_TEXT_COLUMNS, **_IMAGE_COLUMNS}[name] for name in leaves},  # pyright: ignore
            use_dictionary=False,
            write_statistics=False,
        )
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._num_waiting = self._bytes_waiting = self._num_groups = 0
        self._summary = KindSummary()

    def add(self, record: Record, values: dict[str, Any], num_bytes: int) -> None:
        for name, value in values.items():
            self._columns[name].append(value)
        self._summary.count(record)
        self._num_waiting += 1
        self._bytes_waiting += num_bytes
        if self._num_waiting >= ROWS_PER_GROUP or self._bytes_waiting >= BYTES_PER_GROUP:
            self._write_group()

    def close(self) -> KindSummary:
        if self._num_waiting:
            self._write_group()
        self._writer.close()
        self._place.start_writing_back(self._unfinished)
        self._summary.files[self._name] = (self._summary.rows, self._num_groups)
        return self._summary

    def settle(self) -> None:
        self._place.settle(self._unfinished, self._place.build / self._name)

    def _write_group(self) -> None:
        self._writer.write_table(pa.table(self._columns, self._schema), row_group_size=self._num_waiting)
        for values in self._columns.values():
            values.clear()
        self._num_waiting = self._bytes_waiting = 0
        self._num_groups += 1


def _leaf_columns(schema: pa.Schema) -> list[str]:
    return [name for name in (*_TEXT_COLUMNS, *_IMAGE_COLUMNS) if name.split(".")[0] in schema.names]


def finish(finishing: Finishing) -> None:
    """``parquet_info`` of every kind that upstream wants one for, and the dataset YAML, relative to the same folder."""
    entries: dict[str, dict[str, Any]] = {}
    for kind, summary in finishing.kinds.items():
        group = GROUP_OF_KIND[kind]
        entries[kind] = {
            "data_dir": group,
            "num_files": len(summary.files),
            "num_total_samples": summary.rows,
        }
        if kind != "t2i":
            info = {
                name: {"num_row_groups": groups, "num_rows": rows} for name, (rows, groups) in summary.files.items()
            }
            finishing.write(f"{group}_parquet_info.json", json.dumps(info, indent=2) + "\n")
            entries[kind]["parquet_info_path"] = f"{group}_parquet_info.json"
    write_dataset_yaml(finishing, entries, num_used={kind: len(finishing.kinds[kind].files) for kind in entries})


TARGET = Target(
    "bagel_parquet",
    "upstream BAGEL's parquet (multi_ref, unified_edit, t2i_pretrain) with parquet_info and dataset.yaml",
    ("multi_ref", "edit", "t2i"),
    ParquetPart,
    finish,
)
