"""Find the image that a row names: bytes, base64, a file, a member of an archive, or a published path like
``/Echo-4o-Image/…/00000.jpg`` below the folder that the user gives."""

from __future__ import annotations

import base64
import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.archives import Archive, open_archives
from echo4o.data.formats.record import StoredImage
from echo4o.data.images import printable

#: No image file is smaller than this in base64; a shorter text is a path.
_MIN_BASE64 = 48
_MAX_PATH = 4096
_MAX_KNOWN_PLACES = 1 << 16


class NameIndex:
    """Names of files, found by their longest matching end.

    Args:
        names: of the files, with ``/``; each stands for its position.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._by_base: dict[str, int | list[int]] = {}
        for position, name in enumerate(names):
            base = _normal(name).rpartition("/")[2]
            known = self._by_base.get(base)
            if known is None:
                self._by_base[base] = position
            elif isinstance(known, list):
                known.append(position)
            else:
                self._by_base[base] = [known, position]

    def __len__(self) -> int:
        return len(self._names)

    def find(self, parts: Sequence[str]) -> tuple[int, list[int]]:
        """How many components at the end of `parts` match, and all positions that match so many; (0, []) if none."""
        found = self._by_base.get(parts[-1], [])
        best, places = 0, []
        for position in found if isinstance(found, list) else [found]:
            score = _common_end(_normal(self._names[position]).split("/"), parts)
            if score > best:
                best, places = score, [position]
            elif score == best:
                places.append(position)
        return best, places


class ImageFinder:
    """Turns what a row holds for an image into a StoredImage.

    A name is looked for below `folders` and below the folder of the row's file; then with its first components removed
    one by one, since data sets ship the paths of the machine they were made on; then at any depth. The longest matching
    end counts, wherever it is. Two equally good matches are an error of the row.

    Args:
        folders: of the images, tried in order.
        archives: that hold images, opened when the first image is in none of the folders (`open_archives`).
        root: of the data set, for the places of members.
        cache_dir: for unpacked archives; ``None``: beside the data, or the user's cache folder.
        labels: what archives are called, where they are copies.
        remote: remote images: name relative to their folder → URL.
    """

    def __init__(
        self,
        folders: Sequence[Path] = (),
        archives: Sequence[Path] = (),
        *,
        root: Path = Path(),
        cache_dir: Path | None = None,
        labels: Sequence[str] = (),
        remote: Mapping[str, str] | None = None,
    ) -> None:
        self._folders = tuple(folders)
        self._unopened, self._labels = tuple(archives), tuple(labels)
        self._root, self._cache_dir = root, cache_dir
        self._archives: list[Archive] = []
        self._remote = dict(remote or {})
        self._members: NameIndex | None = None
        self._member_of: list[tuple[int, int]] = []
        self._remote_index: NameIndex | None = None
        self._loose: tuple[list[Path], NameIndex] | None = None
        self._known_places: dict[tuple[str, Path | None], list[tuple[int, str, bool]]] = {}

    def has(self, value: Any, folder: Path | None = None) -> bool:
        """Whether an image can be had without opening archives that are not open yet."""
        waiting, self._unopened = self._unopened, ()
        try:
            self(value, folder)
        except RowError:
            return False
        finally:
            self._unopened = waiting
        return True

    def open_archives(self) -> list[str]:
        """Unpack and index what is not yet; a line for everything that is wrong with it. Raises DataError."""
        if not self._unopened:
            return []
        self._archives, problems = open_archives(self._unopened, self._root, self._cache_dir, self._labels)
        self._unopened = ()
        self._members = None
        return problems

    def __call__(self, value: Any, folder: Path | None = None) -> StoredImage:
        """Raises RowError if there is nothing, or a name matches nothing or several images."""
        if isinstance(value, Mapping):
            name = value.get("path") or ""
            if value.get("bytes"):
                return self._from_bytes(value["bytes"], name if isinstance(name, str) else "")
            value = name
        if isinstance(value, bytes | bytearray | memoryview):
            return self._from_bytes(value, "")
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, str) and value:
            return self._from_text(value, folder)
        if value is None or value == "" or value == b"":
            raise RowError("image missing", detail="the row holds no bytes and no path")
        raise RowError("wrong column type", detail=f"an image is {type(value).__name__}, not bytes or a path")

    @staticmethod
    def _from_bytes(value: bytes | bytearray | memoryview, name: str) -> StoredImage:
        return StoredImage(name, functools.partial(bytes, value))

    def _from_text(self, text: str, folder: Path | None) -> StoredImage:
        if text.startswith("data:"):
            return StoredImage("", functools.partial(_decoded, text.partition(",")[2]))
        if "://" in text[:16]:
            return StoredImage(text, functools.partial(_fetched, text))
        if len(text) >= _MIN_BASE64 and "." not in text and _is_base64(text):
            return StoredImage("", functools.partial(_decoded, text))
        if len(text) > _MAX_PATH:
            raise RowError("image missing", detail=f"{printable(text[:80])}… is no path")
        return self._named(text, folder)

    def _named(self, name: str, folder: Path | None) -> StoredImage:
        if os.path.isabs(name) and os.path.isfile(name):
            return _plain(name, Path(name))
        parts = [part for part in _normal(name.replace("\\", "/")).split("/") if part not in ("", ".")]
        if not parts:
            raise RowError("image missing", detail=f"{printable(name)!r} names no file")
        kept, found = self._below(folder, parts, name)
        if found is None:
            self.open_archives()
        member_score, members = self._in_archives(parts)
        if members and member_score > kept:
            return self._member(name, members)
        remote_score, urls = self._in_remote(parts)
        if urls and remote_score > kept:
            return self._distant(name, urls)
        if found is None:
            found = self._anywhere(name, parts)
        return _plain(name, found)

    def _below(self, folder: Path | None, parts: Sequence[str], name: str) -> tuple[int, Path | None]:
        """Components kept and the file, where one lies below a folder at the name without its first components."""
        key = (name[: max(name.rfind("/"), name.rfind("\\")) + 1], folder)
        places = self._known_places.get(key)
        if places is None:
            if len(self._known_places) >= _MAX_KNOWN_PLACES:
                self._known_places.clear()
            places = self._known_places[key] = self._places(folder, parts, name)
        for kept, place, as_given in places:
            path = place + (os.path.basename(name) if as_given else parts[-1])
            if os.path.isfile(path):
                return kept, Path(path)
        return 0, None

    def _places(self, folder: Path | None, parts: Sequence[str], name: str) -> list[tuple[int, str, bool]]:
        """Folders in which such a name may lie: components kept, the folder, whether its last component is as given.

        The same for all names that differ in the last component, so that folders that are not there are asked for once.
        """
        roots = [*self._folders, *([folder] if folder is not None and folder not in self._folders else [])]
        found = []
        for start in range(len(parts)):
            if start and ".." in parts[start:-1]:
                break
            as_given = not start and not name.startswith("/")
            above = os.path.dirname(name) if as_given else "/".join(parts[start:-1])
            for root in roots:
                place = os.path.join(root, above, "")
                if os.path.isdir(place):
                    found.append((len(parts) - start, place, as_given))
        return found

    def _in_archives(self, parts: Sequence[str]) -> tuple[int, list[int]]:
        if not self._archives:
            return 0, []
        if self._members is None:
            names, self._member_of = [], []
            for number, archive in enumerate(self._archives):
                for member, name in enumerate(archive.names):
                    names.append(f"{archive.place}/{name}" if archive.place else name)
                    self._member_of.append((number, member))
            self._members = NameIndex(names)
        score, places = self._members.find(parts)
        if len(places) < 2 or len(parts) < 2:
            return score, places
        # Shards whose members are numbered anew each: the published path then names the shard, as unpacking it does.
        inside = [place for place in places if self._shard_of(place) == parts[-2]]
        return (score, inside) if len(inside) == 1 else (score, places)

    def _shard_of(self, place: int) -> str:
        name = self._archives[self._member_of[place][0]].label.rpartition("/")[2]
        return name.split(".")[0]

    def _member(self, name: str, places: Sequence[int]) -> StoredImage:
        if len(places) > 1:
            labels = [self._archives[self._member_of[place][0]].label for place in places[:2]]
            raise _ambiguous(name, labels)
        number, member = self._member_of[places[0]]
        return StoredImage(name, functools.partial(self._archives[number].read, member))

    def _in_remote(self, parts: Sequence[str]) -> tuple[int, list[int]]:
        if not self._remote:
            return 0, []
        if self._remote_index is None:
            self._remote_index = NameIndex(list(self._remote))
        return self._remote_index.find(parts)

    def _distant(self, name: str, places: Sequence[int]) -> StoredImage:
        urls = list(self._remote.values())
        if len(places) > 1:
            raise _ambiguous(name, [urls[place] for place in places])
        return StoredImage(name, functools.partial(_fetched, urls[places[0]]))

    def _anywhere(self, name: str, parts: Sequence[str]) -> Path:
        """The file below any folder, at any depth. The folders are walked once, when first needed."""
        if self._loose is None:
            files = [(path, str(path.relative_to(root).as_posix())) for root in self._folders for path in walk(root)]
            self._loose = [path for path, _ in files], NameIndex([relative for _, relative in files])
        paths, index = self._loose
        _, places = index.find(parts)
        if len(places) > 1:
            raise _ambiguous(name, [str(paths[place]) for place in places])
        if not places:
            where = ", ".join(map(str, (*self._folders, *(archive.label for archive in self._archives[:3]))))
            raise RowError(
                "image missing",
                detail=f"{printable(name)} is nowhere in {where or 'the working folder'}; say images: where they are",
            )
        return paths[places[0]]

    def __getstate__(self) -> dict[str, Any]:
        # Large and quickly made anew.
        return {**self.__dict__, "_members": None, "_member_of": [], "_remote_index": None, "_loose": None}


def walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, in order of their names. Hidden entries are left out.

    Raises:
        DataError: if links lead round in a circle.
    """
    yield from _walk(folder, ())


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise DataError(f"{folder} is a link to a folder above it; remove the link")
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, identity))
        elif entry.is_file():
            yield Path(entry.path)


def _plain(name: str, path: Path) -> StoredImage:
    path = path.absolute()
    return StoredImage(name, functools.partial(_read_file, path), path)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RowError("image missing", detail=f"{printable(str(path))}: {error.strerror}") from error


def _fetched(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except Exception as error:  # every kind of remote storage has errors of its own
        raise RowError("image missing", detail=f"{printable(url[:200])}: {error}") from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RowError("image unreadable", detail=f"broken base64: {error}") from error


def _is_base64(text: str) -> bool:
    try:
        return bool(_decoded(text))
    except RowError:
        return False


def _ambiguous(name: str, places: Iterable[str]) -> RowError:
    return RowError("image name ambiguous", detail=f"{printable(name)} may be {' or '.join(places)}")


def _common_end(left: Sequence[str], right: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        count += 1
    return count


def _normal(text: str) -> str:
    """Composed Unicode, in which some systems write names and others do not."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
