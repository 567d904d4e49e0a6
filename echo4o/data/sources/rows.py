"""A group's rows: stores of raw rows joined with the planner that gives them meaning, in one position space."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import DEFAULT_PIXEL_LIMIT
from echo4o.data.sources.base import Address, RowPlan, item_seed
from echo4o.data.sources.drafts import PictureReader, SampleLoader, SegmentDraft, unreadable_row
from echo4o.data.sources.order import EpochOrder


class RowStore(Protocol):
    """Raw rows on disk (ParquetRows, JsonlRows)."""

    unit_lengths: list[int]

    def __len__(self) -> int: ...

    def read(self, row: int) -> dict[str, Any]: ...

    def where(self, row: int) -> tuple[str, int]: ...

    def folder(self, row: int) -> Path: ...

    def expect_streams(self, num_streams: int) -> None: ...


class RowPlanner(Protocol):
    """Turns the columns of a raw row into segments. One for each kind of data."""

    #: Columns it may look at, aliases included.
    columns: ClassVar[tuple[str, ...]]

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        """Segments in sequence order. Raises RowError."""
        ...


@dataclass(frozen=True)
class DataSet:
    """One entry of ``dataset_names``.

    Attributes:
        name: for loss by data set.
        store: its raw rows.
        image_folder: where relative image paths start; the row file's folder is tried next.
    """

    name: str
    store: RowStore
    image_folder: Path | None = None


class GroupRows:
    """All data sets of a group as one Source.

    Args:
        name: of the group.
        data_sets: its data sets.
        planner: for its kind of data.
        data_seed: of the run.
        pixel_limit: larger images are refused.
    """

    def __init__(
        self,
        name: str,
        data_sets: Sequence[DataSet],
        planner: RowPlanner,
        data_seed: int,
        pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    ) -> None:
        self.name = name
        #: Time spent reading rows from disk so far, for the loader's timings by stage.
        self.read_seconds = 0.0
        self._data_sets = list(data_sets)
        self._planner = planner
        self._data_seed = data_seed
        self._pixel_limit = pixel_limit
        self._order = EpochOrder([n for part in data_sets for n in part.store.unit_lengths], data_seed, name)
        self._ends = list(accumulate(len(part.store) for part in data_sets))

    def __len__(self) -> int:
        return len(self._order)

    def plan(self, epoch: int, position: int) -> RowPlan:
        """The row at `position` of that epoch's order. Raises RowError."""
        return self.locate(Address(self.name, epoch, self._order.row_at(epoch, position)))

    def locate(self, address: Address) -> RowPlan:
        """The row at `address`, planned exactly as whenever it was planned before. Raises RowError."""
        part = bisect_right(self._ends, address.index)
        if address.source != self.name or not 0 <= part < len(self._ends):
            raise RowError("unknown address", detail=f"{address} is not in {self.name}, which has {len(self)} rows")
        data_set = self._data_sets[part]
        index = address.index - (self._ends[part - 1] if part else 0)
        file, row = data_set.store.where(index)
        seed = item_seed(self._data_seed, address.epoch, self.name, address.index)
        try:
            read_start = time.perf_counter()
            values = data_set.store.read(index)
            self.read_seconds += time.perf_counter() - read_start
            drafts = self._planner.draft(values, self._picture_reader(data_set, index), random.Random(seed))
        except RowError as error:
            raise error.at(file, row) from error
        except DataError:
            raise
        except Exception as error:  # one odd row among millions must be counted, not end the run
            raise unreadable_row(error).at(file, row) from error
        num_tokens = sum(draft.num_tokens for draft in drafts)
        load = SampleLoader(drafts, seed, data_set.name, file, row)
        return RowPlan(address, num_tokens, seed, f"{file}:{row}", data_set.name, load, tuple(drafts))

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams of this process are reading."""
        self._order.expect_streams(num_streams)
        for data_set in self._data_sets:
            data_set.store.expect_streams(num_streams)

    def _picture_reader(self, data_set: DataSet, index: int) -> PictureReader:
        folders = (data_set.image_folder, data_set.store.folder(index))
        return PictureReader(tuple(folder for folder in folders if folder is not None), self._pixel_limit)
