"""Images as files of their own, named by their content: every picture is stored once, whatever part it comes from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from PIL import Image

from echo4o.data.errors import RowError
from echo4o.data.formats.record import StoredImage
from echo4o.data.formats.writers.base import PartPlace, sync_all

FOLDER = "images"
_HASH_BYTES = 16
_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".jxl", ".jp2", ".ppm",
)  # fmt: skip


def _riff_webp(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def _brand(*brands: bytes) -> Callable[[bytes], bool]:
    return lambda start: start[4:8] == b"ftyp" and start[8:12] in brands


#: How files of each kind begin, and the usual ending of their names.
_SIGNATURES: tuple[tuple[str, bytes | Callable[[bytes], bool]], ...] = (
    (".jpg", b"\xff\xd8\xff"),
    (".png", b"\x89PNG\r\n\x1a\n"),
    (".webp", _riff_webp),
    (".gif", b"GIF8"),
    (".bmp", b"BM"),
    (".tif", b"II*\0"),
    (".tif", b"MM\0*"),
    (".avif", _brand(b"avif", b"avis")),
    (".heic", _brand(b"heic", b"heix", b"mif1", b"msf1")),
    (".jp2", b"\0\0\0\x0cjP  "),
    (".jxl", b"\xff\x0a"),
    (".jxl", b"\0\0\0\x0cJXL "),
)


def suffix_of(content: bytes) -> str:
    """Usual ending of the name of such an image.

    Raises:
        RowError: if it is no image: empty, a web page, a Git LFS pointer, ….
    """
    if not content:
        raise RowError("image empty")
    for suffix, signature in _SIGNATURES:
        if signature(content[:16]) if callable(signature) else content.startswith(signature):
            return suffix
    try:
        with Image.open(io.BytesIO(content)) as image:
            return f".{(image.format or 'img').lower()}"
    except Exception as error:  # Pillow's readers raise whatever they meet
        found = content[:40].decode("ascii", "backslashreplace")
        remedy = "; fetch the file with git lfs pull" if content.startswith(b"version https://git-lfs") else ""
        raise RowError("image unreadable", detail=f"no image: it begins with {found!r}{remedy}") from error


def named_suffix(image: StoredImage, content: bytes) -> str:
    """The ending that the data set gives the image, or else the usual one."""
    suffix = PurePosixPath(image.name.replace("\\", "/")).suffix
    return suffix if suffix.lower() in _SUFFIXES else suffix_of(content)


class ImageFiles:
    """Writes the images of one part to ``images/ab/abcdef….jpg`` below the data set."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._used: set[Path] = set()

    def store(self, image: StoredImage, content: bytes) -> str:
        """Path of the image relative to the data set."""
        digest = hashlib.blake2b(content, digest_size=_HASH_BYTES).hexdigest()
        name = f"{FOLDER}/{digest[:2]}/{digest}{named_suffix(image, content)}"
        path = self._place.build / name
        if path not in self._used:
            if not _holds(path, content):
                self._write(path, content)
            self._used.add(path)
        return name

    def sync(self) -> None:
        """Wait until all images of the part are on the disk, also those that another part was first to write."""
        sync_all(self._used | {path.parent for path in self._used})

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = self._place.temporary(path.name)
        unfinished.write_bytes(content)
        try:
            unfinished.rename(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.rename(path)


def _holds(path: Path, content: bytes) -> bool:
    """Whether the file is there and whole: after a loss of power it may be neither."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False
