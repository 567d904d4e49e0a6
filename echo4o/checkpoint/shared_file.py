"""One safetensors file written by many processes at once, each its own bytes: nothing is gathered.

The file's layout follows from names, shapes and dtypes, which every process knows; rank 0 creates the file with its
header and reserves its space, then each process writes its runs (`Piece`) at their offsets.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class FileLayout:
    """Where each tensor lies in a safetensors file.

    Attributes:
        header: what precedes the data.
        begins: name → offset of its first byte in the file.
        num_bytes: of the file.
    """

    header: bytes
    begins: Mapping[str, int]
    num_bytes: int


def plan_file(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> FileLayout:
    """The layout of a file with these tensors (dtype, shape), in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name] = offset
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return FileLayout(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + offset)


def create_file(path: Path, layout: FileLayout) -> None:
    """Write the header and reserve the space, so that a full disk shows before anything is written.

    Raises:
        OSError: if the file cannot be created or there is no room for it.
    """
    with open(path, "wb") as file:
        file.write(layout.header)
        file.flush()
        os.ftruncate(file.fileno(), layout.num_bytes)
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file.fileno(), 0, layout.num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


class SharedFile:
    """This process' hand on a file that `create_file` made; closes (and syncs) as a context manager."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self._layout = layout
        self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write CPU `values` (n,) as elements ``[start, start + n)`` of a tensor.

        Raises:
            OSError: if the disk is full or gone.
        """
        offset = self._layout.begins[name] + start * values.element_size()
        buffer = memoryview(values.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        while buffer:
            written = os.pwrite(self._descriptor, buffer[:_CHUNK_BYTES], offset)
            offset, buffer = offset + written, buffer[written:]

    def __enter__(self) -> SharedFile:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
