"""Reading files at any place from many threads and forked processes: ``pread`` on descriptors that stay open."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

_MAX_OPEN = 256


class Descriptors:
    """Descriptors of files, opened on first use. Beyond some hundred files, they are opened for every read."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file ends before. Raises OSError."""
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None and len(self._open) < _MAX_OPEN:
                descriptor = self._open[path] = os.open(path, os.O_RDONLY)
        if descriptor is not None:
            return _pread(descriptor, offset, size)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _pread(descriptor, offset, size)
        finally:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open, self._lock = {}, threading.Lock()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts, missing = [data], size - len(data)  # a read of more than 2 GB, or a network disk, comes in parts
    while missing and (data := os.pread(descriptor, missing, offset + size - missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
