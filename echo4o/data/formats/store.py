"""What every format offers: rows in training's columns, and the same rows as records for conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.record import Record, training_row
from echo4o.data.sources.rows import RowStore


class FormatStore(Protocol):
    """A RowStore that also tells records. The order of rows is that of the files and never changes.

    Attributes:
        files: files that hold the rows, in order (paths; URLs as text where they are read in place).
        unit_lengths: rows of each run of rows that is cheapest read together.
        problems: what was found wrong on opening and did not stop it, one line each, with file and count.
    """

    files: Sequence[Path | str]
    unit_lengths: list[int]
    problems: list[str]

    def __len__(self) -> int: ...

    def read(self, row: int) -> dict[str, Any]:
        """The row in training's columns. Raises RowError."""
        ...

    def record(self, row: int) -> Record:
        """The row as it is stored. Raises RowError; missing images raise it when they are read."""
        ...

    def kind(self, row: int) -> str:
        """Kind of the row (RECORD_KINDS), told without touching its images. Raises RowError."""
        ...

    def where(self, row: int) -> tuple[str, int]: ...

    def folder(self, row: int) -> Path: ...

    def expect_streams(self, num_streams: int) -> None: ...


class RowParser(Protocol):
    """Gives the columns of a raw row their meaning. Travels into worker processes."""

    @property
    def only_kind(self) -> str:
        """The only kind of row there is; "" where rows differ."""
        ...

    def kind(self, values: Mapping[str, Any]) -> str: ...

    def record(self, values: Mapping[str, Any], where: str, folder: Path) -> Record: ...


class RecordStore:
    """Raw rows joined with the parser of a format: a FormatStore.

    Args:
        rows: raw rows.
        parser: of the format.
        problems: found on opening.
    """

    def __init__(self, rows: RowStore, parser: RowParser, problems: Sequence[str] = ()) -> None:
        self.rows = rows
        self.parser = parser
        self.problems = list(problems)
        self.files: Sequence[Path | str] = list(dict.fromkeys(getattr(rows, "files", ())))
        self.unit_lengths = rows.unit_lengths

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> dict[str, Any]:
        return training_row(self.record(row))

    def record(self, row: int) -> Record:
        file, number = self.where(row)
        try:
            return self.parser.record(self.rows.read(row), f"{file}:{number}", self.rows.folder(row))
        except RowError as error:
            raise error.at(file, number) from error

    def kind(self, row: int) -> str:
        if self.parser.only_kind:
            return self.parser.only_kind
        file, number = self.where(row)
        try:
            return self.parser.kind(self.rows.read(row))
        except RowError as error:
            raise error.at(file, number) from error

    def where(self, row: int) -> tuple[str, int]:
        """File and row in that file, from 0."""
        return self.rows.where(row)

    def folder(self, row: int) -> Path:
        """Folder that holds the row's file."""
        return self.rows.folder(row)

    def expect_streams(self, num_streams: int) -> None:
        """Keep at hand what so many streams are reading."""
        self.rows.expect_streams(num_streams)


@dataclass(frozen=True)
class Opening:
    """How a data set is opened.

    Attributes:
        path: folder, file or URL of the data set.
        images: folder, archive or URL that holds its images, where that is not where the format has them.
        columns: our column name → the data set's, or a list of the data set's columns that together hold the images.
        cache_dir: where unpacked archives and fetched files go; ``None``: beside the data, or the user's cache folder.
        split: of a data set that has several (hf_dataset).
        streaming: read remote files in place instead of fetching them first (hf_dataset).
        kinds: kinds of rows wanted; a format whose parts are of one kind each opens only these parts.
        apply_ratios: repeat and leave out rows as the ratios of a mix ask for (training); otherwise every row once.
    """

    path: str
    images: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: Path | None = None
    split: str | None = None
    streaming: bool = False
    kinds: tuple[str, ...] = ()
    apply_ratios: bool = False


@dataclass(frozen=True)
class Format:
    """A way in which data sets lie on disk.

    Attributes:
        name: as written in ``format:`` and ``--from``.
        description: one line.
        kinds: kinds of rows it can hold.
        opener: opens a data set.
        recognise: whether a local path looks like it; told from names and first rows alone.
    """

    name: str
    description: str
    kinds: tuple[str, ...]
    opener: Callable[[Opening], FormatStore]
    recognise: Callable[[Path], bool]

    def open(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        columns: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        split: str | None = None,
        streaming: bool = False,
        kinds: Sequence[str] = (),
        apply_ratios: bool = False,
    ) -> FormatStore:
        """The data set's rows; see Opening for the arguments.

        Raises:
            DataError: if it is not there, is no such data set, or holds no rows.
        """
        opening = Opening(
            str(path),
            None if images is None else str(images),
            dict(columns or {}),
            None if cache_dir is None else Path(cache_dir).expanduser().absolute(),
            split,
            streaming,
            tuple(kinds),
            apply_ratios,
        )
        store = self.opener(opening)
        if not len(store):
            raise DataError(f"{path} opens as {self.name} but holds no rows")
        return store
