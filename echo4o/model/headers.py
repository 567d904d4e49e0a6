"""Headers of safetensors files: what is wrong with a file, in words, before any tensor is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: safetensors refuses longer headers.
_MAX_HEADER = 100_000_000
#: dtype → bits of an element.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "C64": 64,
    "F4": 4,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; offsets are from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: by name, in the order of their bytes.
        data_begins: offset of the first of them.
        num_bytes: of the file.
    """

    path: Path
    tensors: Mapping[str, Stored]
    data_begins: int
    num_bytes: int


def read_header(path: str | Path) -> Header:
    """The header of a complete safetensors file.

    Raises:
        ValueError: saying what is wrong with it, to follow its name in a sentence.
        OSError: if it cannot be read.
    """
    path = Path(path)
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError("is a Git LFS pointer, not the file itself (git lfs pull fetches it)")
        if len(start) < 8:
            raise ValueError(f"has only {num_bytes} bytes: it was cut off")
        length = struct.unpack("<Q", start)[0]
        if length > _MAX_HEADER:
            raise ValueError("is not a safetensors file")
        text = file.read(length)
    if len(text) < length:
        looks_right = text[:1] == b"{"
        raise ValueError("was cut off inside its header" if looks_right else "is not a safetensors file")
    tensors = _tensors(text, 8 + length)
    end = max((stored.end for stored in tensors.values()), default=8 + length)
    if num_bytes < end:
        raise ValueError(f"was cut off: it has {num_bytes:,} of {end:,} bytes")
    if num_bytes > end:
        raise ValueError(f"has {num_bytes - end:,} bytes beyond its last tensor")
    return Header(path, tensors, 8 + length, num_bytes)


def _tensors(text: bytes, data_begins: int) -> dict[str, Stored]:
    try:
        content: dict[str, Any] = json.loads(text)
        content.pop("__metadata__", None)
        tensors = {
            name: Stored(
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                data_begins + int(entry["data_offsets"][0]),
                data_begins + int(entry["data_offsets"][1]),
            )
            for name, entry in content.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError("is not a safetensors file (its header is unreadable)") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = data_begins
    for name, stored in tensors.items():
        bits = _BITS.get(stored.dtype)
        if bits is None:
            raise ValueError(f"holds {name} with an unknown dtype, {stored.dtype}")
        if stored.begin != place or stored.end - stored.begin != -(-math.prod(stored.shape) * bits // 8):
            raise ValueError(f"has a damaged header: the bytes of {name} do not fit its shape or its neighbours")
        place = stored.end
    return tensors
