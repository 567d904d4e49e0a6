"""Entries of ``dataset_info`` as stores of rows: parquet and JSONL files, or a data set in a published format."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.jsonl import JsonlRows, choose
from echo4o.data.sources.node_cache import NodeCache
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.remote import is_url, list_files, local_or_url
from echo4o.data.sources.rows import RowStore
from echo4o.data.sources.settings import boolean

if TYPE_CHECKING:
    from echo4o.data.formats.store import FormatStore

_log = logging.getLogger(__name__)

# parquet_info_path and the two counts are accepted and not needed: the files' own footers tell the row groups.
ENTRY_KEYS = ("data_dir", "jsonl_path", "json_dir", "parquet_info_path", "num_files", "num_total_samples")
FORMAT_KEYS = ("format", "path", "images", "columns", "split", "streaming")

#: Empty shards are a common left-over of writers; a data set that is mostly empty is a mistake.
_MAX_EMPTY_SHARE = 0.5
#: What a group is opened for, and which kinds of rows it can train on, the first of them that there is.
_WANTED = {"t2i_pretrain": "t2i", "multi_ref": "multi_ref", "unified_edit": "edit", "vlm_sft": "vlm"}
_USABLE = {
    "t2i_pretrain": (("t2i",),),
    "multi_ref": (("multi_ref", "edit"),),
    "unified_edit": (("edit",), ("multi_ref",)),
    "vlm_sft": (("vlm",),),
}


@dataclass(frozen=True)
class StoreOpener:
    """Opens the entries of one group.

    Attributes:
        kind: of data of the group.
        info_dir: where relative paths start.
        cache: of parquet files on a disk of this machine.
        cache_dir: for fetched files and unpacked archives; ``None``: beside the data, or the user's cache folder.
        max_bad_file_share: the run stops where more than this share of a data set's parquet files are unreadable.
        line_seed: choose rows at random with it, where fewer than all are used.
        without_references: text-to-image rows may stand in a multi-reference group.
    """

    kind: str
    info_dir: Path
    cache: NodeCache | None = None
    cache_dir: Path | None = None
    max_bad_file_share: float = 0.1
    line_seed: int | None = None
    without_references: bool = False

    def open(
        self, place: str, entry: Mapping[str, Any], num_used: int | None, columns: Sequence[str]
    ) -> tuple[RowStore, Path | None]:
        """The rows of an entry, and the folder where relative image paths start.

        Args:
            place: of the entry, for messages.
            entry: its settings, their names already checked.
            num_used: parquet files, lines or rows of a format to use; ``None``: all.
            columns: that the group's planner may look at.

        Raises:
            DataError: if there are no rows, or the entry cannot be used.
        """
        if "format" in entry:
            return self._published(place, entry, num_used), None
        for key in FORMAT_KEYS[1:]:
            if key in entry:
                raise DataError(f"{place}.{key} belongs to a format: add e.g. format: echo4o_image")
        folders = self._paths(entry.get("data_dir"))
        store = self._files(place, entry, folders, num_used, columns)
        if not len(store):
            raise DataError(
                f"{place} has no rows: {', '.join(map(str, folders)) or entry} holds only empty or unreadable files"
            )
        if isinstance(store, ParquetRows):
            _check_files(store, place, self.max_bad_file_share)
        return store, next((folder for folder in folders if isinstance(folder, Path) and folder.is_dir()), None)

    def _files(
        self,
        place: str,
        entry: Mapping[str, Any],
        folders: Sequence[Path | str],
        num_used: int | None,
        columns: Sequence[str],
    ) -> RowStore:
        lines = self._paths(entry.get("jsonl_path"))
        if lines or entry.get("json_dir"):
            lines = lines or _with_suffix(self._paths(entry["json_dir"]), ".jsonl")
            return JsonlRows(_existing(lines, place), num_used, self.line_seed, self.cache_dir)
        if not folders:
            raise DataError(
                f"{place} needs data_dir (parquet or JSONL files) or jsonl_path, or format and path of a published "
                "data set"
            )
        parquet = _with_suffix(_existing(folders, place), ".parquet")
        lines = [] if parquet else _with_suffix(folders, ".jsonl")
        if not parquet and not lines:
            raise DataError(f"{place}: no .parquet or .jsonl files in {', '.join(map(str, folders))}")
        # As upstream: num_used_data counts files of parquet data, but lines of JSONL data.
        if lines:
            return JsonlRows(lines, num_used, self.line_seed, self.cache_dir)
        if num_used is not None:
            parquet = [parquet[number % len(parquet)] for number in range(num_used)]
        return ParquetRows(parquet, columns, self.cache)

    def _published(self, place: str, entry: Mapping[str, Any], num_used: int | None) -> RowStore:
        """A data set in its published format, rows of other kinds than the group's left out."""
        # Here, since formats are made of sources.
        from echo4o.data.formats.joined import ChosenRows
        from echo4o.data.formats.registry import format_named

        for key in ENTRY_KEYS:
            if key in entry:
                raise DataError(
                    f"{place}: {key} does not go with format; say path: (and images: if they lie elsewhere)"
                )
        path, columns = entry.get("path"), entry.get("columns")
        if not isinstance(path, str) or not path:
            raise DataError(f"{place} needs path: the data set's folder, file, URL or id")
        if columns is not None and not isinstance(columns, Mapping):
            raise DataError(f"{place}.columns must be a mapping of our names to the data set's, not {columns!r}")
        for key in ("images", "split", "format"):
            if entry.get(key) is not None and not isinstance(entry[key], str):
                raise DataError(f"{place}.{key} must be text, not {entry[key]!r}")
        local = local_or_url(path, self.info_dir)
        if entry["format"] == "hf_dataset" and isinstance(local, Path) and not local.exists():
            local = path  # an id on the hub
        images = entry.get("images")
        wanted = (_WANTED[self.kind], *(("t2i",) if self.without_references else ()))
        try:
            store = format_named(entry["format"]).open(
                local,
                images=local_or_url(images, self.info_dir) if images else None,
                columns=columns,
                cache_dir=self.cache_dir,
                split=entry.get("split"),
                streaming=boolean(entry.get("streaming", False), f"{place}.streaming"),
                kinds=wanted,
                apply_ratios=True,
            )
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        store = self._usable(place, store)
        if num_used is None:
            return store
        return ChosenRows(store, choose(len(store), num_used, self.line_seed))

    def _usable(self, place: str, store: FormatStore) -> FormatStore:
        """The rows whose kind the group can train on. Rows that cannot be read stay, to be counted when they are."""
        from echo4o.data.formats.joined import ChosenRows

        kinds = np.array([_kind(store, row) for row in range(len(store))])
        for choice in _USABLE[self.kind]:
            usable = [*choice, *(("t2i",) if self.without_references else ())]
            rows = np.flatnonzero(np.isin(kinds, ["", *usable]))
            if np.isin(kinds, usable).any():
                break
        else:
            found = ", ".join(f"{count} {kind or 'unreadable'}" for kind, count in _counts(kinds))
            raise DataError(
                f"{place}: no row is of a kind that {self.kind} trains on ({' or '.join(_USABLE[self.kind][0])}). "
                f"Found: {found}.{_remedy(kinds)}"
            )
        if len(rows) == len(store):
            return store
        left_out = [f"{count} {kind}" for kind, count in _counts(np.delete(kinds, rows))]
        _log.info("%s: left out, as %s does not train on them: %s rows", place, self.kind, ", ".join(left_out))
        return ChosenRows(store, rows)

    def _paths(self, value: Any) -> list[Path | str]:
        """Absolute paths and URLs; relative paths start at the folder of the file that names them."""
        values = value if isinstance(value, list) else [value] if value else []
        return [local_or_url(str(path), self.info_dir) for path in values]


def _kind(store: FormatStore, row: int) -> str:
    try:
        return store.kind(row)
    except RowError:
        return ""


def _counts(kinds: np.ndarray) -> list[tuple[str, int]]:
    names, counts = np.unique(kinds, return_counts=True)
    return list(zip(names.tolist(), counts.tolist(), strict=True))


def _remedy(kinds: np.ndarray) -> str:
    groups = [group for group, kind in _WANTED.items() if kind in kinds]
    return f"\n  Put the data set into a group of type {' or '.join(groups)}." if groups else ""


def _check_files(store: ParquetRows, place: str, max_bad_share: float) -> None:
    """Raises DataError if too many files are unreadable, or most hold no rows."""
    num_empty, num_unreadable, num_files = len(store.empty_files), len(store.unreadable_files), store.num_files
    if not num_empty and not num_unreadable:
        return
    summary = (
        f"{place}: {num_empty + num_unreadable} of {num_files} files are left out: {num_empty} without rows, "
        f"{num_unreadable} unreadable"
    )
    _log.warning("%s", summary)
    if num_unreadable > max_bad_share * num_files or num_empty > _MAX_EMPTY_SHARE * num_files:
        first = (store.unreadable_files or store.empty_files)[0]
        raise DataError(
            f"{summary}.\n  At most {max_bad_share:.0%} may be unreadable and {_MAX_EMPTY_SHARE:.0%} without rows; "
            f"the first one: {first}\n  Repair or remove these files."
        )


def _existing(paths: Sequence[Path | str], place: str) -> Sequence[Path | str]:
    for path in paths:
        if isinstance(path, Path) and not path.exists():
            raise DataError(f"{place}: {path} does not exist")
    return paths


def _with_suffix(paths: Sequence[Path | str], suffix: str) -> list[Path | str]:
    """Files with a suffix among paths and directly inside folders (below URLs: at any depth), each folder's by name."""
    found: list[Path | str] = []
    for path in paths:
        if isinstance(path, str):
            found += list_files(path, (suffix,)) if is_url(path) else []
            continue
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [candidate for candidate in candidates if candidate.suffix == suffix and candidate.is_file()]
    return found
