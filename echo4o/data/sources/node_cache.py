"""Copies of data files on a disk of this machine, made on first use.

All processes of a machine share one folder. Whoever needs a file first copies it under a lock, the others wait for it;
a copy has its final name only when it is complete. Where copying fails, files are read where they are.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 24
_HASH_LENGTH = 24


class NodeCache:
    """Args: folder: on a disk of this machine; made when the first file is copied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._failed = False
        self._copies: dict[Path, Path] = {}

    def local(self, source: Path) -> Path:
        """A copy of `source` as it is when it is first asked for; `source` itself where there can be none."""
        copy = self._copies.get(source)
        if copy is not None and copy.exists():
            return copy
        if self._failed:
            return source
        if not os.access(source, os.R_OK):
            return source  # reading it will tell why
        try:
            self._copies[source] = self._copy(source, _name(source))
        except OSError as error:
            self._failed = True
            _log.warning(
                "data_cache_dir %s cannot be used (%s): this process reads further files where they are. Choose a "
                "writable folder with more room with --data_cache_dir",
                self.folder,
                error,
            )
            return source
        return self._copies[source]

    def _copy(self, source: Path, name: str) -> Path:
        copy = self.folder / name
        if copy.exists():
            return copy
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{name}.lock"):
            if not copy.exists():
                for left_over in self.folder.glob(f".{name[:_HASH_LENGTH]}*.partial"):  # of a process that was killed
                    left_over.unlink(missing_ok=True)
                started = time.perf_counter()
                _copy_whole(source, copy, self.folder / f".{name}.{uuid.uuid4().hex}.partial")
                seconds, size = time.perf_counter() - started, copy.stat().st_size
                _log.info("copied %s to %s (%.0f MB in %.1f s)", source, self.folder, size / 1e6, seconds)
        return copy


def _name(source: Path) -> str:
    """Tells a file at a path from every other one, and from what it was before it changed."""
    status = source.stat()
    identity = f"{source.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode()
    # A unique number and an ending are added to hidden names: no name may be longer than 255 bytes.
    return f"{hashlib.blake2b(identity, digest_size=_HASH_LENGTH // 2).hexdigest()}-{source.name[-40:]}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all processes of this machine; the lock of a process that dies is free."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy_whole(source: Path, copy: Path, partial: Path) -> None:
    size = source.stat().st_size
    if (free := shutil.disk_usage(copy.parent).free) < size:
        message = f"{source} has {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, message)
    try:
        with source.open("rb") as reader, partial.open("xb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
            writer.flush()
            os.fsync(writer.fileno())
        if partial.stat().st_size != size:
            raise OSError(errno.ESTALE, f"{source} changed while it was copied")
        partial.rename(copy)
    finally:
        partial.unlink(missing_ok=True)
