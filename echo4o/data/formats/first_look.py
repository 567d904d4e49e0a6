"""What a conversion would do, told from some rows: ``--dry-run``. Writes nothing but unpacked archives in the cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.archives import Archive
from echo4o.data.formats.convert_options import ConvertOptions
from echo4o.data.formats.convert_report import counted
from echo4o.data.formats.record import Record, StoredImage
from echo4o.data.formats.writers import target_named
from echo4o.data.formats.writers.image_files import suffix_of
from echo4o.data.images import printable
from echo4o.data.sources.drafts import unreadable_row

_LOOKED_AT = 200
_SHOWN = 3
_TEXT_LENGTH = 160


@dataclass
class FirstLook:
    """A data set before it is converted.

    Attributes:
        source, source_format, target: of the conversion.
        num_rows, num_files: of the source.
        looked_at: rows that were read with their images, evenly spaced over all.
        kinds: kind of row → of the rows looked at.
        not_held: kinds of rows that the target has no place for → of the rows looked at.
        bad: reason → of the rows looked at.
        first_bad: the first of them, in words.
        places: where images were found → images of the rows looked at.
        suffixes: kind of image file → images of the rows looked at.
        rows: the first rows.
        problems: what is wrong with the source as a whole.
    """

    source: str
    source_format: str
    target: str
    num_rows: int
    num_files: int
    looked_at: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    not_held: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    places: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The same for people."""
        looked = f"of {self.looked_at} rows looked at"
        lines = [
            f"{self.source}: {self.source_format}, {self.num_rows} rows in {self.num_files} files",
            f"kinds ({looked}): {counted(self.kinds)}",
            f"images ({looked}): {counted(self.suffixes)}",
            *(f"  found in {place}: {count}" for place, count in self.places.most_common(5)),
            *self.problems,
        ]
        if self.not_held:
            lines.append(f"left out, as {self.target} has no place for them ({looked}): {counted(self.not_held)}")
        if self.bad:
            lines += [f"bad ({looked}): {counted(self.bad)}", f"  first: {self.first_bad}"]
        for row in self.rows:
            lines += [
                f"{row['where']} ({row['kind']})",
                f"  text: {row['text']}",
                *(f"  {image['role']}: {image['name']} ({image['found']})" for image in row["images"]),
            ]
        return lines


def first_look(options: ConvertOptions) -> FirstLook:
    """Open the source and read some rows with their images.

    Raises:
        DataError: if the source cannot be opened.
    """
    options = options.resolved()
    store, target = options.open(), target_named(options.target)
    num_rows = min(len(store), options.limit or len(store))
    look = FirstLook(options.source, options.source_format, options.target, num_rows, len(store.files))
    look.problems += store.problems
    first = range(min(_SHOWN, num_rows))
    spaced = (number * num_rows // _LOOKED_AT for number in range(_LOOKED_AT))
    for row in sorted({*first, *spaced}):
        look.looked_at += 1
        try:
            record = store.record(row)
            look.kinds[record.kind] += 1
            if options.kinds and record.kind not in options.kinds:
                continue
            look.not_held[record.kind] += record.kind not in target.kinds
            images = [_found(image, look) for image in record.images]
        except DataError:
            raise
        except Exception as error:  # as in the conversion: counted
            bad = error if isinstance(error, RowError) else unreadable_row(error)
            look.bad[bad.reason] += 1
            look.first_bad = look.first_bad or str(bad.at(*store.where(row)))
            continue
        if row in first:
            look.rows.append(_shown(record, images))
    look.not_held = +look.not_held
    return look


def _found(image: StoredImage, look: FirstLook) -> str:
    """Where and what an image is, counted. Raises RowError."""
    content = image.read()
    suffix = suffix_of(content)[1:]
    look.suffixes[suffix] += 1
    holder = getattr(getattr(image.read, "func", None), "__self__", None)
    if image.path is not None:
        place = str(image.path.parent)
    elif isinstance(holder, Archive):
        place = holder.label
    else:
        place = image.name if "://" in image.name[:16] else "the rows themselves"
    look.places[place] += 1
    return f"{suffix}, {len(content) / 1e3:.1f} kB, in {place}"


def _shown(record: Record, images: list[str]) -> dict[str, Any]:
    text = printable(str(record.instructions))
    roles = [f"image {place + 1}" for place in range(len(record.references))]
    roles += ["target"] if record.target is not None else []
    return {
        "where": record.where,
        "kind": record.kind,
        "text": text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…",
        "images": [
            {"role": role, "name": printable(image.name) or "without a name", "found": found}
            for role, image, found in zip(roles, record.images, images, strict=True)
        ],
    }
