"""A plain folder of one's own images.

Shapes that are understood:

1. Rows in a file: ``captions.jsonl``, ``captions.json`` or ``captions.csv`` (or ``metadata.…``) in the folder. A row
   has a text (``instruction|prompt|text|caption``), a target (``target|target_image|output_image|output|file_name``)
   and, in order, references: a list (``refs|references|input_images|…``), in CSV one cell with names between
   semicolons, or columns ``ref1, ref2, …``. Paths start at the folder; names without a folder are also looked for in
   ``targets/`` and ``refs/``. Without references the row is text to image. ``{"name": "text"}`` as JSON gives texts to
   the other shapes.
2. Names tell: ``targets/NAME.png`` with its text in ``captions/NAME.txt`` or ``targets/NAME.txt`` or as NAME in a
   captions file, and its references in ``refs/NAME/`` (numbered: ``1.png, 2.png``, ``ref_01.jpg, …``) or
   ``refs/NAME_1.png, refs/NAME_2.png``, or a single ``refs/NAME.png``.
3. ``NAME.png`` and ``NAME.txt`` side by side, without ``targets/``: text to image.

The order of references is that of the list or of their numbers. Files without numbers have no order: such a row is bad.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import ImageFinder, walk
from echo4o.data.formats.layout import IMAGE_SUFFIXES, files_in, local_path
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.columns import INPUT_IMAGES, OUTPUT_IMAGE

_CAPTION_FILES = tuple(f"{name}.{end}" for name in ("captions", "metadata") for end in ("jsonl", "json", "csv"))
_TEXT = ("instruction", "prompt", "text", "caption", "captions")
_TARGET = ("target", *OUTPUT_IMAGE, "file_name", "image")
_REFERENCES = ("refs", "references", *(name for name in INPUT_IMAGES if name != "image"))
_NUMBERED = re.compile(r"(?:ref|reference|image)_?(\d+)", re.IGNORECASE)
_BLOCK_ROWS = 64


class FolderRows:
    """Rows of a plain folder, in memory: names only. A row that is wrong raises RowError when it is read."""

    def __init__(self, rows: list[tuple[str, int, dict[str, Any] | RowError]], folder: Path) -> None:
        self._rows = rows
        self._folder = folder
        self.files = list(dict.fromkeys(file for file, _, _ in rows))
        full, rest = divmod(len(rows), _BLOCK_ROWS)
        self.unit_lengths = [_BLOCK_ROWS] * full + [rest] * bool(rest)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> dict[str, Any]:
        """instruction, input_images, output_image. Raises RowError."""
        values = self._rows[row][2]
        if isinstance(values, RowError):
            raise values
        return values

    def where(self, row: int) -> tuple[str, int]:
        """File and row in it; the target's file and 0 where names tell."""
        return self._rows[row][:2]

    def folder(self, row: int) -> Path:
        """The data set's folder."""
        return self._folder

    def expect_streams(self, num_streams: int) -> None:
        """Everything is in memory."""


def open_folder(opening: Opening) -> FormatStore:
    """The folder, or its captions file.

    Raises:
        DataError: if it has none of the shapes above.
    """
    path = local_path(opening)
    folder = path if path.is_dir() else path.parent
    captions = _captions_file(path)
    rows: list[tuple[str, int, dict[str, Any] | RowError]] = []
    texts: dict[str, str] = {}
    if captions is not None:
        rows, texts = _rows_of(captions, opening.columns)
    if not rows:
        rows = _named_rows(folder, texts)
    images = Path(opening.images).expanduser().absolute() if opening.images else None
    places = [place for place in (images, folder, folder / "targets", folder / "refs") if place is not None]
    return RecordStore(FolderRows(rows, folder), FieldParser(ImageFinder(places)))


def _captions_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    return next((path / name for name in _CAPTION_FILES if (path / name).is_file()), None)


def _rows_of(
    file: Path, columns: Mapping[str, Any]
) -> tuple[list[tuple[str, int, dict[str, Any] | RowError]], dict[str, str]]:
    """Rows of a captions file, or the texts by name where it says no more."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    entries: list[Any]
    if file.suffix == ".csv":
        entries = list(csv.DictReader(content.splitlines(keepends=True)))
    elif file.suffix == ".json":
        try:
            values = json.loads(content)
        except ValueError as error:
            raise DataError(f"{file} is no JSON: {error}") from error
        if isinstance(values, dict) and all(isinstance(text, str) for text in values.values()):
            return [], values
        entries = list(values.values()) if isinstance(values, dict) else values
    else:
        entries = [_line(line) for line in content.split("\n") if line.strip()]
    return [(str(file), number, _row(entry, columns)) for number, entry in enumerate(entries)], {}


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return RowError("invalid json", detail=str(error))


def _row(entry: Any, columns: Mapping[str, Any]) -> dict[str, Any] | RowError:
    if isinstance(entry, RowError):
        return entry
    if not isinstance(entry, dict):
        return RowError("invalid json", detail=f"a row is {type(entry).__name__}, not an object")
    text, target = (
        _first(entry, columns.get(ours), names) for ours, names in (("instruction", _TEXT), ("output_image", _TARGET))
    )
    references = _first(entry, columns.get("input_images"), _REFERENCES)
    if isinstance(references, str):
        references = [name.strip() for name in references.split(";") if name.strip()]
    if references is None:
        numbered = [
            (int(match[1]), value) for name, value in entry.items() if name and (match := _NUMBERED.fullmatch(name))
        ]
        references = [value for _, value in sorted(numbered) if value]
    if target is None:
        return RowError("no images", detail=f"a row needs one of {', '.join(_TARGET)}")
    if text is None:
        return RowError("instruction missing", detail=f"a row needs one of {', '.join(_TEXT)}")
    known = {*_TEXT, *_TARGET, *_REFERENCES, *INPUT_IMAGES, "conversations", "instruction_list"}
    others = {name: value for name, value in entry.items() if name and name not in known}
    return {**others, "instruction": text, "input_images": references, "output_image": target}


def _first(entry: Mapping[str, Any], mapped: Any, names: tuple[str, ...]) -> Any:
    if isinstance(mapped, list):
        return [entry[name] for name in mapped if entry.get(name)] or None
    return next((entry[name] for name in ((mapped,) if mapped else names) if entry.get(name)), None)


def _named_rows(folder: Path, texts: Mapping[str, str]) -> list[tuple[str, int, dict[str, Any] | RowError]]:
    """A row for every target, by name."""
    has_targets = (folder / "targets").is_dir()
    targets = folder / "targets" if has_targets else folder
    images = [path for path in walk(targets) if path.suffix.lower() in IMAGE_SUFFIXES]
    references = _references_by_name(folder / "refs") if has_targets else {}
    rows: list[tuple[str, int, dict[str, Any] | RowError]] = []
    for image in images:
        name = image.relative_to(targets).with_suffix("").as_posix()
        text = _text_of(folder, image, name, texts)
        try:
            if text is None:
                raise RowError("instruction missing", detail=f"neither {name}.txt nor an entry in a captions file")
            given = _ordered(references.get(name, []), name)
            row = {"instruction": text, "input_images": [str(path) for path in given], "output_image": str(image)}
            rows.append((str(image), 0, row))
        except RowError as error:
            rows.append((str(image), 0, error))
    if not rows:
        raise DataError(
            f"{folder} has neither {' nor '.join(_CAPTION_FILES)} nor images in targets/ or beside their texts"
        )
    return rows


def _text_of(folder: Path, image: Path, name: str, texts: Mapping[str, str]) -> str | None:
    for key in (name, image.name, f"targets/{image.name}"):
        if key in texts:
            return texts[key]
    for file in (folder / "captions" / f"{name}.txt", image.with_suffix(".txt")):
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return None


def _references_by_name(refs: Path) -> dict[str, list[Path]]:
    """Reference files of each name: those in ``refs/NAME/``, ``refs/NAME_1.png``, ``refs/NAME.png``."""
    found: dict[str, list[Path]] = {}
    if not refs.is_dir():
        return found
    for path in walk(refs):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        inside = path.relative_to(refs)
        if inside.parent != Path():
            found.setdefault(inside.parent.as_posix(), []).append(path)
            continue
        found.setdefault(path.stem, []).append(path)
        numbered = re.fullmatch(r"(.+)[_-](\d+)", path.stem)
        if numbered:
            found.setdefault(numbered[1], []).append(path)
    return found


def _ordered(paths: list[Path], name: str) -> list[Path]:
    """By their numbers. Raises RowError where several have none or the same."""
    if len(paths) < 2:
        return paths
    numbers = [re.findall(r"\d+", re.sub(rf"^{re.escape(name)}[_-]", "", path.stem)) for path in paths]
    keys = [int(found[-1]) if found else None for found in numbers]
    if None in keys or len(set(keys)) < len(keys):
        shown = ", ".join(path.name for path in paths[:4])
        raise RowError("order of references unknown", detail=f"{shown}: number them, or list them in captions.jsonl")
    return [path for _, path in sorted(zip(keys, paths, strict=True))]  # type: ignore[type-var]


def _recognise(path: Path) -> bool:
    if path.is_file():
        return path.name in _CAPTION_FILES
    if _captions_file(path) is not None or (path / "targets").is_dir():
        return True
    images = files_in(path, IMAGE_SUFFIXES)
    return any(image.with_suffix(".txt").is_file() for image in images[:16])


FORMAT = Format(
    "folder",
    "a plain folder: targets/, refs/, captions as .txt, .jsonl, .json or .csv",
    ("multi_ref", "t2i"),
    open_folder,
    _recognise,
)
