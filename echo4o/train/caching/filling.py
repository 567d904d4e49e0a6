"""Making the shard of a unit: threads decode, this thread encodes, one image at a time as training does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import to_tensor
from echo4o.data.sources.drafts import SegmentDraft, unreadable_row
from echo4o.data.sources.rows import GroupRows
from echo4o.train.caching.encoders import Encoder
from echo4o.train.caching.progress import Progress
from echo4o.train.caching.survey import Failures
from echo4o.train.caching.work import Unit, as_bytes, write_shard


class Filler:
    """Called with a unit that this process has claimed.

    Args:
        items: `ITEM` records that tell where the images of all units are.
        threads: that decode.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        sources: Sequence[GroupRows],
        items: np.ndarray,
        threads: int,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.sources = sources
        self.items = np.sort(items, order="key")
        self.ahead = 2 * threads
        self.progress = progress
        self.failures = Failures()
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, unit: Unit) -> None:
        tensors: dict[bytes, Tensor] = {}
        waiting: deque[tuple[bytes, str, int, Future[Tensor]]] = deque()

        def encode_next() -> None:
            key, file, row, future = waiting.popleft()
            try:
                tensors[key] = self.encoder(future.result())
            except RowError as error:
                self.failures.add(error.at(file, row))
            self.progress.tick(len(tensors))

        for key, item in zip(as_bytes(unit.keys), self._items_of(unit), strict=True):
            source = self.sources[item["group"]]
            try:
                draft = source.images(int(item["row"]))[item["place"]]
            except RowError as error:
                self.failures.add(error)
                continue
            file, _, row = source.row_name(int(item["row"])).rpartition(":")
            waiting.append((key, file, int(row), self._pool.submit(_pixels, draft)))
            if len(waiting) > self.ahead:
                encode_next()
        while waiting:
            encode_next()
        write_shard(self.folder, unit, tensors)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _items_of(self, unit: Unit) -> np.ndarray:
        return self.items[np.searchsorted(self.items["key"], unit.keys)]


def _pixels(draft: SegmentDraft) -> Tensor:
    assert draft.picture is not None  # image segments have one
    try:
        return to_tensor(draft.picture.decode(), draft.size)
    except (RowError, DataError):
        raise
    except Exception as error:  # one odd image among millions must be counted, not end the run
        raise unreadable_row(error) from error
