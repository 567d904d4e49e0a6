"""What is converted to what: the settings of a conversion, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.formats.record import RECORD_KINDS
from echo4o.data.formats.registry import FORMATS, FormatStore, detect, format_named
from echo4o.data.formats.writers import target_named
from echo4o.data.sources.remote import is_url

DEFAULT_ROWS_PER_PART = 1024
PHRASINGS = ("all", "first")


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted to what.

    Attributes:
        source: folder, file or URL.
        target: name in TARGETS.
        source_format: name in FORMATS, or ``auto``.
        images, columns, cache_dir, split, streaming: as in Opening.
        kinds: only rows of these kinds; empty for all.
        limit: only the first rows.
        phrasings: ``all`` phrasings of a text, or the ``first``.
        rows_per_part: rows that are done anew after a kill, and rows of a parquet file or tar.
    """

    source: str
    target: str
    source_format: str = "auto"
    images: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: Path | None = None
    split: str | None = None
    streaming: bool = False
    kinds: tuple[str, ...] = ()
    limit: int | None = None
    phrasings: str = "all"
    rows_per_part: int = DEFAULT_ROWS_PER_PART

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in RECORD_KINDS:
                raise DataError(f"unknown kind of row {kind!r}; known: {', '.join(RECORD_KINDS)}")
        if self.source_format not in ("auto", *FORMATS):
            raise DataError(f"unknown format {self.source_format!r}; known: auto, {', '.join(FORMATS)}")
        if self.phrasings not in PHRASINGS:
            raise DataError(f"phrasings must be {' or '.join(PHRASINGS)}, not {self.phrasings!r}")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit must be at least 1, not {self.limit}")
        if self.rows_per_part < 1:
            raise DataError(f"rows_per_part must be at least 1, not {self.rows_per_part}")
        target_named(self.target)

    def resolved(self) -> ConvertOptions:
        """With the name of the format in place of ``auto``, and absolute paths. Raises DataError if it is unknown."""
        source = self.source if is_url(self.source) else str(Path(self.source).expanduser().absolute())
        if self.source_format != "auto":
            return replace(self, source=source)
        if is_url(source):
            raise DataError(f"the format of {source} cannot be told from afar: name it with --from")
        return replace(self, source=source, source_format=detect(source))

    def open(self) -> FormatStore:
        """The source. Raises DataError if it cannot be opened."""
        return format_named(self.source_format).open(
            self.source,
            images=self.images,
            columns=self.columns,
            cache_dir=self.cache_dir,
            split=self.split,
            streaming=self.streaming,
            kinds=self.kinds,
        )
