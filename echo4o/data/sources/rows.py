"""A group's rows: stores of raw rows joined with the planner that gives them meaning, in one position space."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import DEFAULT_PIXEL_LIMIT
from echo4o.data.latent_cache import LatentCache
from echo4o.data.sample import ConditionDropout
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
    #: Whether a row lays down only some of its images, others in other epochs.
    images_vary: ClassVar[bool]

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        """Segments in sequence order. Raises RowError."""
        ...

    def images(self, row: Mapping[str, Any], pictures: PictureReader) -> list[SegmentDraft]:
        """Every image segment that some epoch may lay down, dropout aside. Raises RowError."""
        ...

    def resize_rules(self) -> dict[str, Any]:
        """Kind of image (``vae_image``, ``vit_image``) → what decides about its size, for JSON."""
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
        dropout: probabilities of its samples, where they are not the run's.
    """

    def __init__(
        self,
        name: str,
        data_sets: Sequence[DataSet],
        planner: RowPlanner,
        data_seed: int,
        pixel_limit: int = DEFAULT_PIXEL_LIMIT,
        dropout: ConditionDropout | None = None,
    ) -> None:
        self.name = name
        #: Time spent reading rows from disk so far, for the loader's timings by stage.
        self.read_seconds = 0.0
        #: What is known of images without decoding them.
        self.cache: LatentCache | None = None
        self._data_sets = list(data_sets)
        self._planner = planner
        self._data_seed = data_seed
        self._pixel_limit = pixel_limit
        self._dropout = dropout
        self._order = EpochOrder([n for part in data_sets for n in part.store.unit_lengths], data_seed, name)
        self._ends = list(accumulate(len(part.store) for part in data_sets))

    def __len__(self) -> int:
        return len(self._order)

    def plan(self, epoch: int, position: int) -> RowPlan:
        """The row at `position` of that epoch's order. Raises RowError."""
        return self.locate(Address(self.name, epoch, self._order.row_at(epoch, position)))

    def locate(self, address: Address) -> RowPlan:
        """The row at `address`, planned exactly as whenever it was planned before. Raises RowError."""
        if address.source != self.name or not 0 <= address.index < len(self):
            raise RowError("unknown address", detail=f"{address} is not in {self.name}, which has {len(self)} rows")
        data_set, index = self._place(address.index)
        file, row = data_set.store.where(index)
        seed = item_seed(self._data_seed, address.epoch, self.name, address.index)
        drafts = self._drafted(address.index, partial(self._planner.draft, rng=random.Random(seed)))
        num_tokens = sum(draft.num_tokens for draft in drafts)
        load = SampleLoader(drafts, seed, data_set.name, file, row, self.cache)
        place = f"{file}:{row}"
        return RowPlan(address, num_tokens, seed, place, data_set.name, load, tuple(drafts), self._dropout)

    def images(self, index: int) -> list[SegmentDraft]:
        """Every image segment that some epoch may lay down for a row, by its index. Raises RowError."""
        return self._drafted(index, self._planner.images)

    def rows_of_data_sets(self) -> list[tuple[str, range]]:
        """Each data set's name and the indexes of its rows, as in an `Address`."""
        starts = [0, *self._ends[:-1]]
        return [
            (part.name, range(start, end)) for part, start, end in zip(self._data_sets, starts, self._ends, strict=True)
        ]

    @property
    def images_vary(self) -> bool:
        """Whether an epoch lays down only some of `images`."""
        return self._planner.images_vary

    def row_name(self, index: int) -> str:
        """``file:row`` of a row, by its index."""
        data_set, place = self._place(index)
        file, row = data_set.store.where(place)
        return f"{file}:{row}"

    def resize_rules(self) -> dict[str, Any]:
        """Kind of image → what decides about its size; only kinds that this group lays down."""
        return self._planner.resize_rules()

    def _place(self, index: int) -> tuple[DataSet, int]:
        """Data set of a row, and its index there."""
        part = bisect_right(self._ends, index)
        return self._data_sets[part], index - (self._ends[part - 1] if part else 0)

    def _drafted(
        self, index: int, draft: Callable[[Mapping[str, Any], PictureReader], list[SegmentDraft]]
    ) -> list[SegmentDraft]:
        """What `draft` makes of a row; whatever is wrong with it becomes a RowError with its place."""
        data_set, place = self._place(index)
        file, row = data_set.store.where(place)
        try:
            read_start = time.perf_counter()
            values = data_set.store.read(place)
            self.read_seconds += time.perf_counter() - read_start
            return draft(values, self._picture_reader(data_set, place))
        except RowError as error:
            raise error.at(file, row) from error
        except DataError:
            raise
        except Exception as error:  # one odd row among millions must be counted, not end the run
            raise unreadable_row(error).at(file, row) from error

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams of this process are reading."""
        self._order.expect_streams(num_streams)
        for data_set in self._data_sets:
            data_set.store.expect_streams(num_streams)

    @property
    def problems(self) -> list[str]:
        """What was found wrong on opening and did not stop it, one line each."""
        return [line for data_set in self._data_sets for line in getattr(data_set.store, "problems", ())]

    def _picture_reader(self, data_set: DataSet, index: int) -> PictureReader:
        folders = (data_set.image_folder, data_set.store.folder(index))
        return PictureReader(tuple(folder for folder in folders if folder is not None), self._pixel_limit)
