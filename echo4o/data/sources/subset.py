"""Some of a group's rows: one side of a split, and at most so many of them.

Which rows they are depends on the rows alone: not on the run's seed, their order, their number or other settings. So
two groups (or two YAML files) with the same ``split`` never share a row across its sides, and rows that are appended
leave the others on their side. ``max_rows`` takes the first rows of a hash order: a random choice that rows appended
later can only thin out, never reshuffle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo4o.data.errors import DataError
from echo4o.data.sources.row_identity import content_keys, place_keys, uniform
from echo4o.data.sources.rows import DataSet, RowStore
from echo4o.data.sources.settings import check_key, probability, whole, wrong

_log = logging.getLogger(__name__)

SUBSET_KEYS = ("split", "use_split", "max_rows", "subset_seed")
SIDES = ("train", "validation")
_WAYS = ("content", "row")


@dataclass(frozen=True)
class Split:
    """Rows are divided by a hash of what they are.

    Attributes:
        validation: share of the rows on that side.
        by: ``content``: texts and image names, so that copies of a row are on one side; ``row``: data set, file name
            and row, of which nothing has to be read.
        seed: another one divides otherwise.
    """

    validation: float
    by: str = "content"
    seed: int = 0


class SubsetRows:
    """Some rows of a store, ascending.

    Args:
        store: of all rows.
        rows: (N,) int64.
    """

    def __init__(self, store: RowStore, rows: np.ndarray) -> None:
        self.store = store
        self.files = getattr(store, "files", ())
        self._rows = rows
        ends = np.cumsum(np.asarray(store.unit_lengths, dtype=np.int64))
        unit_of = np.searchsorted(ends, rows, side="right")
        self.unit_lengths: list[int] = np.bincount(unit_of, minlength=len(ends)).tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> dict[str, Any]:
        """Raises RowError."""
        return self.store.read(int(self._rows[row]))

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file."""
        return self.store.where(int(self._rows[row]))

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        return self.store.folder(int(self._rows[row]))

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams are reading."""
        self.store.expect_streams(num_streams)


@dataclass(frozen=True)
class Subset:
    """What a group says about its rows.

    Attributes:
        group: its name, for messages.
        split, side: how rows are divided, and the side that is used.
        max_rows: of the group, or of each of its data sets; ``None``: all.
        seed: of the choice that max_rows makes.
    """

    group: str
    split: Split | None = None
    side: str = "train"
    max_rows: int | tuple[int | None, ...] | None = None
    seed: int = 0

    @classmethod
    def read(cls, group: str, settings: Mapping[str, Any], num_data_sets: int) -> Subset:
        """From the group's settings. Raises DataError if one is wrong."""
        split, side = settings.get("split"), settings.get("use_split")
        if side is not None:
            if split is None:
                raise DataError(
                    f"{group}.use_split in the dataset config needs a split, such as split: {{validation: 0.02}}"
                )
            if not isinstance(side, str):
                raise wrong(side, f"{group}.use_split", " or ".join(SIDES))
            check_key(side, SIDES, f"{group}.use_split {side!r} in the dataset config")
        return cls(
            group,
            None if split is None else _read_split(split, f"{group}.split"),
            side or "train",
            _read_max_rows(settings.get("max_rows"), f"{group}.max_rows", num_data_sets),
            whole(settings.get("subset_seed", 0), f"{group}.subset_seed", at_least=0),
        )

    def describe(self) -> dict[str, Any]:
        """JSON-able account of it; empty where all rows are used."""
        told: dict[str, Any] = {}
        if self.split is not None:
            told["split"] = {"validation": self.split.validation, "by": self.split.by, "seed": self.split.seed}
            told["use_split"] = self.side
        if self.max_rows is not None:
            told["max_rows"] = list(self.max_rows) if isinstance(self.max_rows, tuple) else self.max_rows
            told["subset_seed"] = self.seed
        return told

    def of(self, data_sets: Sequence[DataSet], columns: Sequence[str]) -> list[DataSet]:
        """The data sets with the rows that are used; the split comes first, then max_rows. What is left is logged.

        Args:
            columns: that rows are made of.

        Raises:
            DataError: if no row is left.
        """
        if self.split is not None:
            data_sets = self._on_side(data_sets, self.split, columns)
        if self.max_rows is None:
            return list(data_sets)
        if isinstance(self.max_rows, int):
            return self._first(data_sets, self.max_rows)
        return [
            first
            for part, limit in zip(data_sets, self.max_rows, strict=True)
            for first in ([part] if limit is None else self._first([part], limit))
        ]

    def _on_side(self, data_sets: Sequence[DataSet], split: Split, columns: Sequence[str]) -> list[DataSet]:
        if split.by == "content":
            _log.info("%s: reading the texts of %d rows to split them by content", self.group, _num_rows(data_sets))
        kept, num_validation = [], 0
        for part in data_sets:
            by_content = split.by == "content"
            keys = content_keys(part.name, part.store, columns) if by_content else place_keys(part.name, part.store)
            validation = uniform(keys, split.seed, "split") < split.validation
            num_validation += int(validation.sum())
            kept.append(_with_rows(part, np.flatnonzero(validation if self.side == "validation" else ~validation)))
        num_rows = _num_rows(data_sets)
        found = f"{self.group}: {num_validation:,} of {num_rows:,} rows are for validation"
        if not _num_rows(kept):
            raise DataError(f"{found}, so that nothing is left for use_split: {self.side}.{_split_remedy(split)}")
        _log.info("%s; this group uses the %s for %s", found, f"{_num_rows(kept):,} rows", self.side)
        spread = 5 * (num_rows * split.validation * (1 - split.validation)) ** 0.5
        if abs(num_validation - num_rows * split.validation) > max(spread, 5):
            _log.warning(
                "%s, not %g: many have the same texts and image names.%s", found, split.validation, _split_remedy(split)
            )
        return kept

    def _first(self, data_sets: Sequence[DataSet], limit: int) -> list[DataSet]:
        """The first rows of all of them together, by a hash."""
        num_rows = _num_rows(data_sets)
        what = self.group if len(data_sets) > 1 else f"{self.group}.{data_sets[0].name}"
        if limit >= num_rows:
            _log.info("%s: all %d rows are used, max_rows is %d", what, num_rows, limit)
            return list(data_sets)
        _log.info("%s: max_rows uses %d of %d rows", what, limit, num_rows)
        places = [uniform(place_keys(part.name, part.store), self.seed, "max_rows") for part in data_sets]
        chosen = np.zeros(num_rows, dtype=bool)
        chosen[np.argsort(np.concatenate(places), kind="stable")[:limit]] = True
        ends = np.cumsum([len(part.store) for part in data_sets])[:-1]
        return [
            _with_rows(part, np.flatnonzero(rows)) for part, rows in zip(data_sets, np.split(chosen, ends), strict=True)
        ]


def check_splits(subsets: Sequence[tuple[Subset, set[str]]]) -> None:
    """Raises DataError if a file is divided in one group and not, or otherwise, in another: their rows would overlap.

    Args:
        subsets: of all groups, each with the files it reads.
    """
    for number, (one, files) in enumerate(subsets):
        for other, other_files in subsets[:number]:
            if one.split != other.split and (shared := sorted(files & other_files)):
                raise DataError(
                    f"groups {other.group} and {one.group} both read {shared[0]}, but their split differs "
                    f"({_told(other)}; {_told(one)}), so that rows of validation would be trained on.\n"
                    "  Give both the same split, and the one use_split: train, the other use_split: validation."
                )


def _told(subset: Subset) -> str:
    return "none" if subset.split is None else str(subset.describe()["split"])


def _read_split(values: Any, place: str) -> Split:
    if not isinstance(values, Mapping):
        raise wrong(values, place, "a mapping such as {validation: 0.02}")
    for key in values:
        check_key(key, ("validation", "by", "seed"), f"{place}.{key} in the dataset config")
    if "validation" not in values:
        raise DataError(f"{place} in the dataset config lacks validation: a share such as 0.02")
    validation = probability(values["validation"], f"{place}.validation")
    if not 0 < validation < 1:
        raise DataError(f"{place}.validation in the dataset config is {validation:g}; a part lies between 0 and 1")
    way = values.get("by", "content")
    if not isinstance(way, str):
        raise wrong(way, f"{place}.by", " or ".join(_WAYS))
    check_key(way, _WAYS, f"{place}.by {way!r} in the dataset config")
    return Split(validation, way, whole(values.get("seed", 0), f"{place}.seed", at_least=0))


def _read_max_rows(value: Any, place: str, num_data_sets: int) -> int | tuple[int | None, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        return whole(value, place)
    if len(value) != num_data_sets:
        raise DataError(f"{place} has {len(value)} numbers for {num_data_sets} dataset_names")
    return tuple(None if number is None else whole(number, place) for number in value)


def _split_remedy(split: Split) -> str:
    by_row = ", or divide by place, which lets copies of a row fall on both sides: by: row"
    return f"\n  Choose another share or seed of the split{by_row if split.by == 'content' else ''}."


def _num_rows(data_sets: Sequence[DataSet]) -> int:
    return sum(len(part.store) for part in data_sets)


def _with_rows(part: DataSet, rows: np.ndarray) -> DataSet:
    return replace(part, store=SubsetRows(part.store, rows))
