"""How a cached image is known: by the content of its file and the size it is resized to."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HASH_BYTES = 16
KEY_BYTES = HASH_BYTES + 8


def content_hash(data: bytes | Path) -> bytes:
    """BLAKE2b of an image file's bytes. Raises OSError where a path cannot be read."""
    return hashlib.blake2b(data if isinstance(data, bytes) else data.read_bytes(), digest_size=HASH_BYTES).digest()


def image_key(content: bytes, size: tuple[int, int]) -> bytes:
    """Key of an image that is resized to `size` (width, height): its content hash and the two sides."""
    return content + struct.pack(">II", *size)


def key_size(key: bytes) -> tuple[int, int]:
    """(width, height) of a key."""
    width, height = struct.unpack(">II", key[HASH_BYTES:])
    return width, height


def key_name(key: bytes) -> str:
    """A key as it names a tensor: ``hash.WIDTHxHEIGHT``."""
    width, height = key_size(key)
    return f"{key[:HASH_BYTES].hex()}.{width}x{height}"


def key_of_name(name: str) -> bytes:
    """Raises ValueError for anything but a `key_name`."""
    content, _, size = name.partition(".")
    width, _, height = size.partition("x")
    key = image_key(bytes.fromhex(content), (int(width), int(height)))
    if len(key) != KEY_BYTES:
        raise ValueError(f"{name} is no image of the cache")
    return key


def rule_file(rule: Mapping[str, Any]) -> str:
    """File name of a resize rule (`GroupRows.resize_rule`)."""
    return hashlib.blake2b(json.dumps(rule, sort_keys=True).encode(), digest_size=8).hexdigest() + ".json"
