"""Images inside .tar, .tar.gz and .zip files, by name and in any order.

A .tar.gz can only be read from its beginning, so it is unpacked once to an uncompressed .tar in the cache folder.
Nothing is ever extracted by the names of members.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.descriptors import Descriptors
from echo4o.data.formats.members import MAX_RATIO, Members, tar_members, zip_members
from echo4o.data.images import printable
from echo4o.data.sources.node_cache import locked
from echo4o.data.sources.remote import cache_folder

_log = logging.getLogger(__name__)
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
_CHUNK_BYTES = 1 << 22
#: An archive may grow to this size whatever its ratio.
_FREE_BYTES = 1 << 30
#: Indexes of smaller archives are made faster than they are looked up.
_MIN_KEPT_INDEX = 2000
_THREADS = 4


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES)


@dataclass(frozen=True)
class Archive:
    """An indexed archive.

    Attributes:
        label: its own path, for messages.
        place: folder of the archive relative to the data set's folder, where unpacking would put its members.
        path: the file that is read (of a .tar.gz, the unpacked .tar).
        members: what is in it.
        descriptors: shared by all archives of a data set.
    """

    label: str
    place: str
    path: Path
    members: Members
    descriptors: Descriptors
    zipped: bool = False

    @property
    def names(self) -> Sequence[str]:
        return self.members.names

    def read(self, member: int) -> bytes:
        """Bytes of a member. Raises RowError if the archive is broken there."""
        offset, size = int(self.members.offsets[member]), int(self.members.sizes[member])
        try:
            if self.zipped:
                return self._unzipped(member, offset, size)
            data = self.descriptors.read(self.path, offset, size)
        except OSError as error:
            raise self._broken(member, str(error)) from error
        if len(data) != size:
            raise self._broken(member, f"{len(data)} of {size} bytes")
        return data

    def _unzipped(self, member: int, offset: int, size: int) -> bytes:
        header = self.descriptors.read(self.path, offset, 30)
        if header[:4] != b"PK\3\4":
            raise self._broken(member, "no member begins where the directory says")
        start = offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self.descriptors.read(self.path, start, size)
        full_size = int(self.members.full_sizes[member])
        if int.from_bytes(header[8:10], "little"):
            try:
                data = zlib.decompressobj(-15).decompress(data, full_size + 1)
            except zlib.error as error:
                raise self._broken(member, str(error)) from error
        if len(data) != full_size or zlib.crc32(data) != int(self.members.checksums[member]):
            raise self._broken(member, f"{len(data)} bytes that are not the {full_size} of the directory")
        return data

    def _broken(self, member: int, detail: str) -> RowError:
        return RowError("archive broken", detail=f"{self.label}: {printable(self.names[member])}: {detail}")


def open_archives(
    paths: Sequence[Path], root: Path, cache_dir: Path | None = None, labels: Sequence[str] = ()
) -> tuple[list[Archive], list[str]]:
    """Archives in the order given, indexed, and a line for everything that is wrong with them.

    Args:
        paths: archives on this machine.
        root: of the data set; members are looked for as if they were unpacked beside their archive.
        cache_dir: for unpacked archives and indexes; ``None``: beside the data, or the user's cache folder.
        labels: what to call them, where they are copies.

    Raises:
        DataError: if an archive cannot be read at all, is a bomb, or there is no room to unpack it.
    """
    descriptors = Descriptors()

    def opened(number: int) -> Archive:
        path = paths[number]
        label = labels[number] if labels else str(path)
        place = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        return _open(path, label, "" if place == "." else place, cache_dir, root, descriptors)

    with ThreadPoolExecutor(_THREADS) as pool:
        archives = list(pool.map(opened, range(len(paths))))
    problems = [line for archive in archives for line in archive.members.problems(archive.label)]
    for line in problems:
        _log.warning("%s", line)
    return archives, problems


def _open(path: Path, label: str, place: str, cache_dir: Path | None, root: Path, descriptors: Descriptors) -> Archive:
    try:
        with path.open("rb") as file:
            magic = file.read(64)
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {label}: {error.strerror}") from error
    if magic.startswith(b"version https://git-lfs"):
        raise DataError(f"{label} is a pointer of Git LFS, not the archive: run git lfs pull")
    if magic[:2] == b"PK":
        return Archive(label, place, path, zip_members(path), descriptors, zipped=True)
    identity = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode()
    key = f"{hashlib.blake2b(identity, digest_size=12).hexdigest()}-{path.name[-60:]}"
    if magic[:2] == b"\x1f\x8b":
        folder = cache_folder(root, cache_dir)
        unpacked = folder / f"{key}.tar"
        with locked(folder / f".{key}.lock"):
            state = _state_of(unpacked)
            if state is None:
                state = _unpack(path, label, unpacked)
            members = _indexed(unpacked, folder / f"{key}.index.npz", keep=True)
        members.broken = state or members.broken
        return Archive(label, place, unpacked, members, descriptors)
    if not magic:
        return Archive(label, place, path, Members(broken="empty"), descriptors)
    members = tar_members(path) if status.st_size < 1 << 28 else None
    if members is None:
        folder = cache_folder(root, cache_dir)
        with locked(folder / f".{key}.lock"):
            members = _indexed(path, folder / f"{key}.index.npz", keep=False)
    return Archive(label, place, path, members, descriptors)


def _indexed(tar: Path, index: Path, *, keep: bool) -> Members:
    members = Members.load(index)
    if members is None:
        members = tar_members(tar)
        if keep or len(members.names) >= _MIN_KEPT_INDEX:
            members.save(index)
    return members


def _state_of(unpacked: Path) -> str | None:
    """How the archive that was unpacked ends ("": whole); ``None`` if it must be unpacked (again)."""
    try:
        state = json.loads(_state_file(unpacked).read_bytes())
        return state["broken"] if unpacked.stat().st_size == state["size"] else None
    except (OSError, ValueError, KeyError):
        return None


def _state_file(unpacked: Path) -> Path:
    return unpacked.with_suffix(".json")


def _unpack(path: Path, label: str, target: Path) -> str:
    """Decompress to `target`, which has its name only when everything that could be had is in it. Returns its end."""
    for left_over in target.parent.glob(f".{target.name}.*.partial"):  # of a process that was killed
        left_over.unlink(missing_ok=True)
    size = path.stat().st_size
    _log.info("unpacking %s (%.0f MB) once into %s", label, size / 1e6, target.parent)
    started = time.perf_counter()
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        with path.open("rb") as reader, partial.open("xb") as writer:
            broken = _decompress(reader, writer, label, limit=max(_FREE_BYTES, MAX_RATIO * size))
        written = partial.stat().st_size
        partial.rename(target)
        # Told apart from a file that a crash of the machine left shorter.
        _state_file(target).write_text(json.dumps({"size": written, "broken": broken}))
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise DataError(
            f"cannot unpack {label} into {target.parent}: {error.strerror} ({free / 1e6:.0f} MB are free). "
            "Give a folder with more room as --data_cache_dir"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    seconds = max(time.perf_counter() - started, 1e-9)
    _log.info("unpacked %s: %.0f MB in %.1f s (%.0f MB/s)", label, written / 1e6, seconds, written / 1e6 / seconds)
    return broken


def _decompress(reader, writer, label: str, limit: int) -> str:
    """Gunzip, several streams in a row included. Returns what is wrong with the end, "" if nothing."""
    decompressor, written, inside = zlib.decompressobj(31), 0, False
    while chunk := reader.read(_CHUNK_BYTES):
        while chunk:
            if decompressor.eof:
                chunk = chunk.lstrip(b"\0")  # padding between or behind streams
                if not chunk:
                    break
                decompressor = zlib.decompressobj(31)
            try:
                data = decompressor.decompress(chunk, _CHUNK_BYTES)
            except zlib.error as error:
                return f"damaged after {written} unpacked bytes ({error})"
            inside = not decompressor.eof
            writer.write(data)
            written += len(data)
            if written > limit:
                raise DataError(f"{label} grows beyond {limit / 1e9:.1f} GB: it looks like a decompression bomb")
            chunk = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    return f"broken off after {written} unpacked bytes" if inside else ""
