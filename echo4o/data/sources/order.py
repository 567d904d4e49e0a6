"""The order of an epoch: units shuffled, rows shuffled inside each unit, nothing left out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from echo4o.data.sources.base import item_seed

_KEPT_EPOCHS = 2
_KEPT_UNITS = 4  # or two a stream, where there are more


class EpochOrder:
    """Maps positions to rows. A unit (parquet row group, block of lines) holds consecutive rows.

    A contiguous span of positions touches few units, so that consumers which take spans read each unit about once.

    Args:
        unit_lengths: rows of each unit.
        data_seed: of the run.
        name: of the source; sources with different names are shuffled differently.
    """

    def __init__(self, unit_lengths: Sequence[int], data_seed: int, name: str) -> None:
        self._first_rows = np.concatenate([[0], np.cumsum(np.asarray(unit_lengths, dtype=np.int64))])
        self._data_seed = data_seed
        self._name = name
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._units: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._num_kept_units = _KEPT_UNITS

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def expect_streams(self, num_streams: int) -> None:
        """Remember the order of the units at which so many streams are."""
        self._num_kept_units = max(_KEPT_UNITS, 2 * num_streams)

    def row_at(self, epoch: int, position: int) -> int:
        """Row at a position of an epoch; each row stands at exactly one position."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {self._name}, which has {len(self)} rows")
        units, first_positions = self._epoch(epoch)
        place = int(np.searchsorted(first_positions, position, side="right")) - 1
        unit = int(units[place])
        return int(self._first_rows[unit] + self._rows_of(epoch, unit)[position - int(first_positions[place])])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled units, and the position at which each begins."""
        if epoch not in self._epochs:
            lengths = np.diff(self._first_rows)
            units = self._shuffled(len(lengths), epoch, "units")
            units = units[lengths[units] > 0]
            first_positions = np.concatenate([[0], np.cumsum(lengths[units])])[:-1]
            _remember(self._epochs, epoch, (units, first_positions), _KEPT_EPOCHS)
        return self._epochs[epoch]

    def _rows_of(self, epoch: int, unit: int) -> np.ndarray:
        key = (epoch, unit)
        if key not in self._units:
            length = int(self._first_rows[unit + 1] - self._first_rows[unit])
            _remember(self._units, key, self._shuffled(length, epoch, f"unit {unit}"), self._num_kept_units)
        return self._units[key]

    def _shuffled(self, length: int, epoch: int, what: str) -> np.ndarray:
        seed = item_seed(self._data_seed, epoch, f"{self._name}\0order\0{what}", 0)
        return np.random.Generator(np.random.PCG64(seed)).permutation(length)


def _remember(cache: OrderedDict, key, value, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
