"""BLIP3-o: WebDataset tars in which an image and a text share their name up to the first dot (``jpg`` and ``txt``)."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo4o.data.errors import RowError
from echo4o.data.formats.archives import Archive, is_archive, open_archives
from echo4o.data.formats.finder import walk
from echo4o.data.formats.layout import IMAGE_SUFFIXES, files_in, local_path
from echo4o.data.formats.record import Record, StoredImage
from echo4o.data.formats.store import Format, FormatStore, Opening, RecordStore
from echo4o.data.sources.remote import cache_folder, fetched, is_url, list_files

_log = logging.getLogger(__name__)
_TARS = (".tar", ".tar.gz", ".tgz")
_TEXT_KEYS = ("caption", "prompt", "text", "txt")


class TarSamples:
    """Rows of WebDataset tars: pairs of an image and a text, in the order of the images.

    Args:
        archives: indexed tars.
        problems: found on opening them; samples without a pair are added, counted for each tar.
    """

    def __init__(self, archives: Sequence[Archive], problems: Sequence[str] = ()) -> None:
        self.archives = list(archives)
        self.files = [archive.label for archive in archives]
        self.problems = list(problems)
        pairs, lengths = [], []
        for number, archive in enumerate(archives):
            found, alone = _pairs(archive.names)
            pairs += [(number, image, text) for image, text in found]
            lengths.append(len(found))
            if alone:
                shown = ", ".join(alone[:3])
                self.problems.append(f"{archive.label}: {len(alone)} samples lack an image or a text ({shown})")
                _log.warning("%s", self.problems[-1])
        self._pairs = np.array(pairs, dtype=np.int64).reshape(len(pairs), 3)
        self._firsts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.unit_lengths = [length for length in lengths if length]

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, row: int) -> dict[str, Any]:
        """``image`` as a StoredImage and ``text``. Raises RowError if the text cannot be read."""
        number, image, text = (int(value) for value in self._pairs[row])
        archive = self.archives[number]
        stored = StoredImage(archive.names[image], functools.partial(archive.read, image))
        return {"image": stored, "text": _text(archive, text)}

    def where(self, row: int) -> tuple[str, int]:
        """Tar, and number of the pair in it from 0."""
        number = int(self._pairs[row][0])
        return self.archives[number].label, row - int(self._firsts[number])

    def folder(self, row: int) -> Path:
        """Folder that holds the tar."""
        return Path(self.where(row)[0]).parent

    def expect_streams(self, num_streams: int) -> None:
        """Members are read one by one: nothing has to be kept for a stream."""


class PairParser:
    """A text-to-image row."""

    only_kind = "t2i"

    def kind(self, values: Mapping[str, Any]) -> str:
        return "t2i"

    def record(self, values: Mapping[str, Any], where: str, folder: Path) -> Record:
        return Record("t2i", values["text"], target=values["image"], where=where)


def open_blip3o(opening: Opening) -> FormatStore:
    """A tar, a folder of tars at any depth, or a URL of either, which is fetched."""
    labels: list[str] = []
    if is_url(opening.path) and not opening.path.startswith("file://"):
        labels = list_files(opening.path, _TARS)
        folder = cache_folder(None, opening.cache_dir)
        root, paths = folder, [fetched(url, folder) for url in labels]
    else:
        root = path = local_path(opening)
        if path.is_file():
            root, paths = path.parent, [path]
        else:
            paths = [file for file in walk(path) if file.name.lower().endswith(_TARS)]
    archives, problems = open_archives(paths, root, opening.cache_dir, labels)
    samples = TarSamples(archives, problems)
    return RecordStore(samples, PairParser(), samples.problems)


def _pairs(names: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """(image, text) members of every sample, and keys of samples without one of them."""
    groups: dict[str, list[int]] = {}
    for member, name in enumerate(names):
        folder, _, base = name.rpartition("/")
        groups.setdefault(f"{folder}/{base.partition('.')[0]}", []).append(member)
    found, alone = [], []
    for key, members in groups.items():
        pairs = list(_paired(names, members))
        if pairs:
            found += pairs
        elif any(_is_image(names[member]) or _is_text(names[member]) for member in members):
            alone.append(key.lstrip("/"))
    return sorted(found), alone


def _paired(names: Sequence[str], members: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pairs of a group: by equal names without the last part of the extension, else the one image and the one text."""
    images = [member for member in members if _is_image(names[member])]
    texts = [member for member in members if _is_text(names[member])]
    by_stem = {names[text].rpartition(".")[0]: text for text in sorted(texts, key=lambda text: _is_plain(names[text]))}
    exact = [(image, by_stem[stem]) for image in images if (stem := names[image].rpartition(".")[0]) in by_stem]
    if exact:
        yield from exact
    elif len(images) == 1 and texts:
        yield images[0], max(texts, key=lambda text: _is_plain(names[text]))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _is_text(name: str) -> bool:
    return name.lower().endswith((".txt", ".json", ".caption"))


def _is_plain(name: str) -> bool:
    return name.lower().endswith(".txt")


def _text(archive: Archive, member: int) -> str:
    name = archive.names[member]
    try:
        text = archive.read(member).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("text not UTF-8", detail=f"{name}, byte {error.start}") from error
    if not name.lower().endswith(".json"):
        return text
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RowError("invalid json", detail=f"{name}: {error}") from error
    found = next((values[key] for key in _TEXT_KEYS if isinstance(values, dict) and values.get(key)), None)
    if not isinstance(found, str):
        raise RowError("instruction missing", detail=f"{name} has no {' or '.join(_TEXT_KEYS)}")
    return found


def _recognise(path: Path) -> bool:
    tars = files_in(path, _TARS)
    if not tars or (path.is_dir() and files_in(path, (".jsonl", ".json", ".parquet"))):
        return False
    if not is_archive(tars[0].name) or not tars[0].name.lower().endswith(".tar"):
        return False
    from echo4o.data.formats.members import tar_members

    return bool(_pairs(tar_members(tars[0]).names)[0])


FORMAT = Format(
    "blip3o",
    "BLIP3-o: WebDataset tars of jpg and txt",
    ("t2i",),
    open_blip3o,
    _recognise,
)
