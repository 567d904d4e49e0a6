"""What a target of conversion offers: a writer for each part, and what joins the parts at the end."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from echo4o.data.errors import RowError
from echo4o.data.formats.record import Record

#: Kind of row → group of a dataset YAML, and the name of that kind's files.
GROUP_OF_KIND = {
    "multi_ref": "multi_ref",
    "edit": "unified_edit",
    "t2i": "t2i_pretrain",
    "vlm": "vlm_sft",
}
_syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if os.name == "posix" else None
_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class CannotHold(RowError):
    """A good row that the target has no place for."""


@dataclass(frozen=True)
class PartPlace:
    """Where a part is written.

    Attributes:
        index: of the part, from 0.
        build: folder that becomes the data set.
        state: folder for what is joined at the end.
        temp: folder for unfinished files, on the same disk.
        final: where `build` will stand.
        phrasings: ``all`` phrasings of a text, or the ``first``.
        notes: what the target could not hold as it was → number of rows. Written to.
    """

    index: int
    build: Path
    state: Path
    temp: Path
    final: Path
    phrasings: str = "all"
    notes: Counter[str] = field(default_factory=Counter)

    def temporary(self, name: str) -> Path:
        """Path for an unfinished file that no other process uses."""
        return self.temp / f"{os.getpid()}-{self.index}-{name}"

    def start_writing_back(self, unfinished: Path) -> None:
        """Let the system begin to bring a file to the disk, so that waiting for it later is short."""
        if not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def settle(self, unfinished: Path, path: Path) -> None:
        """Give a finished file its name once it is on the disk."""
        sync_file(unfinished)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(path)
        sync_file(path.parent)


@dataclass
class KindSummary:
    """Rows of one kind in one part, or in all of them.

    Attributes:
        rows: written.
        without_references: rows of a kind with references that have none.
        most_references: of any row.
        files: file name relative to the data set → (rows, row groups).
    """

    rows: int = 0
    without_references: int = 0
    most_references: int = 0
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, record: Record) -> None:
        self.rows += 1
        self.without_references += not record.references
        self.most_references = max(self.most_references, len(record.references))

    def add(self, other: KindSummary) -> None:
        self.rows += other.rows
        self.without_references += other.without_references
        self.most_references = max(self.most_references, other.most_references)
        self.files |= other.files


class PartWriter(Protocol):
    """Writes the rows of one part, in order."""

    def add(self, record: Record, images: Sequence[bytes], row: int) -> None:
        """Take a row with the bytes of all its images in order, the target last.

        Args:
            row: number in the source, from 0.

        Raises:
            CannotHold: if the target has no place for it.
            RowError: if it is bad. In both cases nothing of the row is kept.
        """
        ...

    def close(self) -> dict[str, KindSummary]:
        """Finish all files under temporary names and tell what they hold, by kind."""
        ...

    def settle(self) -> None:
        """Wait until all files are on the disk, then give them their names. The next part may be begun before."""
        ...


@dataclass(frozen=True)
class Finishing:
    """What the end of a conversion has to work with.

    Attributes:
        build, state, temp, final: as in PartPlace.
        kinds: what was written, by kind.
        num_parts: of the conversion.
    """

    build: Path
    state: Path
    temp: Path
    final: Path
    kinds: dict[str, KindSummary]
    num_parts: int

    @property
    def name(self) -> str:
        """Of the data set, for YAML."""
        return _NAME.sub("_", self.final.name).strip("_") or "data"

    def write(self, name: str, content: str | Iterable[bytes]) -> None:
        """A file of the data set, whole or not at all."""
        unfinished = self.temp / f"{os.getpid()}-{name.replace('/', '-')}"
        with unfinished.open("wb") as file:
            for chunk in [content.encode()] if isinstance(content, str) else content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        path = self.build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(path)


@dataclass(frozen=True)
class Target:
    """A format that can be written.

    Attributes:
        name: as in ``--to``.
        description: one line.
        kinds: kinds of rows it can hold.
        open_part: starts a part.
        finish: writes what stands beside the parts; run again from its beginning after a kill.
    """

    name: str
    description: str
    kinds: tuple[str, ...]
    open_part: Callable[[PartPlace], PartWriter]
    finish: Callable[[Finishing], Any]


def sync_all(paths: Collection[Path]) -> None:
    """Wait until many files of one disk are on it: at once where the system can, since each by itself takes long."""
    if not paths:
        return
    if _syncfs is None:
        for path in paths:
            sync_file(path)
        return
    descriptor = os.open(next(iter(paths)), os.O_RDONLY)
    try:
        if _syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
