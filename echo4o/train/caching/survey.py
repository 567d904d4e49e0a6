"""Which images a run needs: every row's image segments by content and size, found without decoding any."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from echo4o.data.errors import RowError
from echo4o.data.latent_keys import KEY_BYTES, content_hash, image_key
from echo4o.data.sources.base import SourceGroup
from echo4o.data.sources.drafts import EncodedPicture, SegmentDraft
from echo4o.data.sources.rows import GroupRows
from echo4o.train.processes import Processes

#: An image segment: its key, and where it is: number of the group, row, place among `GroupRows.images` of the row.
ITEM = np.dtype([("key", f"S{KEY_BYTES}"), ("group", "u2"), ("row", "i8"), ("place", "u2")])
NUM_EXAMPLES = 5
_AHEAD = 8


@dataclass
class Failures:
    """Rows and images that cannot be used: how many by reason, and some of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: RowError) -> None:
        self.counts[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(str(error))

    def merge(self, other: Failures) -> None:
        self.counts += other.counts
        for reason, examples in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: NUM_EXAMPLES - len(mine)]

    def describe(self) -> str:
        """Lines: a reason with its count, then some of the places."""
        lines = []
        for reason, count in self.counts.most_common():
            lines.append(f"{reason}: {count:,}")
            lines += [f"  {example}" for example in self.examples[reason]]
        return "\n".join(lines)


@dataclass
class Survey:
    """What the rows of a run hold.

    Attributes:
        items: of each kind, `ITEM` records: one for each distinct image and size, where it comes first.
        num_rows: rows looked at.
        num_too_long: of these, rows whose images alone exceed the limit of a sample.
        failures: of these, rows without usable images.
    """

    items: dict[str, np.ndarray]
    num_rows: int = 0
    num_too_long: int = 0
    failures: Failures = field(default_factory=Failures)


def cacheable(groups: Sequence[SourceGroup]) -> list[GroupRows]:
    """Sources whose images can be named beforehand, in the order of their groups."""
    return [group.source for group in groups if isinstance(group.source, GroupRows)]


def take_survey(
    sources: Sequence[GroupRows],
    kinds: Sequence[str],
    processes: Processes,
    *,
    max_num_tokens: int,
    num_threads: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Look at every row; each process at its share. The result is the same on all, and for any number of them.

    Args:
        kinds: of images, ``vae_image`` and ``vit_image``.
        max_num_tokens: of a sample; rows whose images alone have more are never trained on.
        on_progress: called with this process' rows done and in all.
    """
    shares = [_share(len(source), processes) for source in sources]
    total, found = sum(map(len, shares)), {kind: [] for kind in kinds}
    survey = Survey({})
    with ThreadPoolExecutor(num_threads) as pool:
        for number, (source, rows) in enumerate(zip(sources, shares, strict=True)):
            source.expect_streams(1)
            drafts = _readable(source, rows, max_num_tokens, survey, lambda: on_progress(survey.num_rows, total))
            for row, entries in _hashed(pool, num_threads, drafts, kinds, survey):
                for kind, place, key in entries:
                    found[kind].append((key, number, row, place))
    parts = processes.gather(
        ({kind: np.array(items, dtype=ITEM) for kind, items in found.items()}, survey.num_rows, survey.num_too_long,
         survey.failures)
    )  # fmt: skip
    whole = Survey({kind: _distinct(np.concatenate([items[kind] for items, *_ in parts])) for kind in kinds})
    for _, num_rows, num_too_long, failures in parts:
        whole.num_rows += num_rows
        whole.num_too_long += num_too_long
        whole.failures.merge(failures)
    return whole


def _share(num_rows: int, processes: Processes) -> range:
    rank, count = processes.rank, processes.world_size
    return range(num_rows * rank // count, num_rows * (rank + 1) // count)


def _readable(
    source: GroupRows, rows: range, max_num_tokens: int, survey: Survey, on_row: Callable[[], None]
) -> Iterator[tuple[int, list[SegmentDraft]]]:
    for row in rows:
        survey.num_rows += 1
        on_row()
        try:
            drafts = source.images(row)
        except RowError as error:
            survey.failures.add(error)
            continue
        if not source.images_vary and sum(draft.num_tokens for draft in drafts) > max_num_tokens:
            survey.num_too_long += 1
        else:
            yield row, drafts


def _hashed(
    pool: ThreadPoolExecutor,
    num_threads: int,
    rows: Iterator[tuple[int, list[SegmentDraft]]],
    kinds: Sequence[str],
    survey: Survey,
) -> Iterator[tuple[int, list[tuple[str, int, bytes]]]]:
    """(row, [(kind, place, key)]) in order; files are read and hashed by threads."""
    waiting: deque[tuple[int, Future]] = deque()

    def finished() -> Iterator[tuple[int, list[tuple[str, int, bytes]]]]:
        row, future = waiting.popleft()
        try:
            yield row, future.result()
        except RowError as error:
            survey.failures.add(error)

    for row, drafts in rows:
        waiting.append((row, pool.submit(_keys, drafts, kinds)))
        if len(waiting) > _AHEAD * num_threads:
            yield from finished()
    while waiting:
        yield from finished()


def _keys(drafts: Sequence[SegmentDraft], kinds: Sequence[str]) -> list[tuple[str, int, bytes]]:
    contents: dict[int, bytes] = {}
    entries = []
    for place, draft in enumerate(drafts):
        picture = draft.picture
        if draft.kind not in kinds or not isinstance(picture, EncodedPicture):
            continue
        if id(picture) not in contents:
            try:
                contents[id(picture)] = content_hash(picture.data)
            except OSError as error:
                raise RowError("image missing", detail=str(error)) from error
        entries.append((draft.kind, place, image_key(contents[id(picture)], draft.size)))
    return entries


def _distinct(items: np.ndarray) -> np.ndarray:
    """Of equal keys the first, in the order of groups and rows."""
    items = items[np.lexsort((items["place"], items["row"], items["group"]))]
    _, first = np.unique(items["key"], return_index=True)
    return items[np.sort(first)]
