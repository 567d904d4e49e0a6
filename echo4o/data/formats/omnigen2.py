"""OmniGen2 and X2I2: JSONL of ``task_type, instruction, input_images, output_image``, and YAML mixes
``data: [{path, type, ratio}]`` whose paths are files, folders or further mixes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from echo4o.data.errors import DataError
from echo4o.data.formats.fields import FieldParser
from echo4o.data.formats.finder import walk
from echo4o.data.formats.joined import ChosenRows, JoinedStore
from echo4o.data.formats.json_rows import JsonRows
from echo4o.data.formats.layout import archives_below, first_row, image_finder, local_path, record_store
from echo4o.data.formats.store import Format, FormatStore, Opening

_log = logging.getLogger(__name__)
_ROWS = (".jsonl", ".json")
_MIXES = (".yml", ".yaml")
_ROW_FOLDERS = ("jsonls", "jsonl", "json")


def open_omnigen2(opening: Opening) -> FormatStore:
    """A mix (YAML), a folder (all JSONL and JSON files at any depth), or one file.

    The ratio of a source in a mix is its share of the rows. Upstream reads the ratios and does not use them; here they
    count in training (`apply_ratios`): an epoch has as many rows as the sources together, taken by ratio, so that small
    sources with a large ratio repeat and large ones with a small ratio are used in part. The numbers are logged.

    Raises:
        DataError: if a path does not exist, a mix is malformed or leads back to itself.
    """
    path = local_path(opening)
    if path.suffix.lower() not in _MIXES:
        return _leaf(opening, path)
    sources = _sources(path, 1.0, ())
    stores = [_leaf(opening, source, path.parent) for source, _ in sources]
    if opening.apply_ratios:
        total = sum(len(store) for store in stores)
        whole = sum(share for _, share in sources)
        stores = [
            _shared(store, source, round(total * share / whole))
            for store, (source, share) in zip(stores, sources, strict=True)
        ]
    return JoinedStore(stores)


def _sources(mix: Path, share: float, above: tuple[Path, ...]) -> list[tuple[Path, float]]:
    """Files and folders of a mix, with their shares of the whole."""
    if mix.resolve() in above:
        raise DataError(f"{mix} contains itself: {' → '.join(map(str, (*above, mix)))}")
    entries = _entries(mix)
    whole = sum(ratio for _, ratio in entries)
    if not whole:
        raise DataError(f"{mix}: all ratios are 0")
    found: list[tuple[Path, float]] = []
    for path, ratio in entries:
        part = share * ratio / whole
        if path.suffix.lower() in _MIXES:
            found += _sources(path, part, (*above, mix.resolve()))
        elif ratio:
            found.append((path, part))
    return found


def _entries(mix: Path) -> list[tuple[Path, float]]:
    try:
        content: Any = yaml.safe_load(mix.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{mix} cannot be read as YAML: {error}") from error
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{mix} needs data: a list of {{path, type, ratio}}")
    found = []
    for number, entry in enumerate(entries):
        place = f"{mix}: data[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise DataError(f"{place} needs a path, not {entry!r}")
        ratio = entry.get("ratio", 1)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < float("inf"):
            raise DataError(f"{place}: ratio must be a number from 0, not {ratio!r}")
        found.append((_existing(entry["path"], mix, place), float(ratio)))
    return found


def _existing(text: str, mix: Path, place: str) -> Path:
    """A path as the mix means it: from the working directory, as upstream, or from the mix or a folder above it."""
    path = Path(text).expanduser()
    candidates = (
        [path] if path.is_absolute() else [path, *(folder / path for folder in list(mix.absolute().parents)[:4])]
    )
    for candidate in candidates:
        if candidate.exists():
            return candidate.absolute()
    raise DataError(f"{place}: {text} does not exist; looked for {', '.join(map(str, candidates))}")


def _leaf(opening: Opening, path: Path, mix_folder: Path | None = None) -> FormatStore:
    """Rows of a file or folder; images below it, beside a folder of JSONL files, or below the folder of the mix."""
    files = [path] if path.is_file() else [file for file in walk(path) if file.suffix.lower() in _ROWS]
    if not files:
        raise DataError(f"{path} holds no JSONL or JSON files")
    root = path if path.is_dir() else path.parent
    folders = [root.parent if root.name in _ROW_FOLDERS else root, *([mix_folder] if mix_folder else [])]
    archives = [] if opening.images else [archive for folder in folders for archive in archives_below(folder)]
    finder = image_finder(opening, folders, archives)
    return record_store(JsonRows(files), FieldParser(finder, opening.columns))


def _shared(store: FormatStore, source: Path, num_rows: int) -> FormatStore:
    _log.info("%s: %d of its %d rows an epoch, by its ratio in the mix", source, num_rows, len(store))
    if num_rows == len(store):
        return store
    return ChosenRows(store, _spread(len(store), num_rows))


def _spread(num_available: int, num_wanted: int) -> np.ndarray:
    """Rows evenly spaced over what there is; all of them as often as they fit, and then some once more."""
    times, rest = divmod(num_wanted, num_available)
    everywhere = np.tile(np.arange(num_available), times)
    return np.concatenate([everywhere, np.arange(rest) * num_available // max(rest, 1)])


def _recognise(path: Path) -> bool:
    if path.is_file() and path.suffix.lower() in _MIXES:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and isinstance(content.get("data"), list)
    files: Sequence[Path] = [path] if path.is_file() else []
    if path.is_dir():
        files = next(([file] for file in walk(path) if file.suffix.lower() in _ROWS), [])
    row = first_row(files[0], _ROWS) if files else None
    return row is not None and "task_type" in row and "instruction" in row and "output_image" in row


FORMAT = Format(
    "omnigen2",
    "OmniGen2, X2I2: JSONL of task_type, instruction, input_images, output_image; YAML mixes",
    ("t2i", "edit", "multi_ref"),
    open_omnigen2,
    _recognise,
)
