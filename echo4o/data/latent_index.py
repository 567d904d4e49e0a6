"""Where every image lies in the shards of a cache: read off the shards, and kept in one file as a short cut."""

from __future__ import annotations

import json
import logging
import os
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from echo4o.data.latent_keys import KEY_BYTES, key_of_name

_log = logging.getLogger(__name__)

SHARDS, INDEX = "shards", "index.safetensors"
_KEYS = f"S{KEY_BYTES}"


@dataclass(frozen=True)
class Index:
    """Images sorted by key.

    Attributes:
        shards: (name, bytes) of the shard files, by name.
        keys: (n,) byte strings of `KEY_BYTES`.
        shard_of: (n,) int32 number of the shard.
        offsets: (n,) int64 place in it, in bytes.
    """

    shards: tuple[tuple[str, int], ...]
    keys: np.ndarray
    shard_of: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, key: bytes) -> int | None:
        """Place of a key, or None."""
        place = int(np.searchsorted(self.keys, np.array(key, dtype=_KEYS)))
        return place if place < len(self.keys) and self.keys[place : place + 1].tobytes() == key else None

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of (m,) keys is there."""
        return np.isin(keys, self.keys)


def read_index(folder: Path, num_bytes: Callable[[bytes], int]) -> Index:
    """The images in all complete shards of a store; what is no complete shard is left out and logged.

    Args:
        num_bytes: size of the tensor of a key.
    """
    present = {entry.name: entry.stat().st_size for entry in _shards(folder / SHARDS)}
    known = _stored(folder / INDEX)
    shards, keys, shard_of, offsets = [], [], [], []
    for name, size in sorted(present.items()):
        if (name, size) in known:
            found, places = known[name, size]
        else:
            try:
                found, places = _shard_entries(folder / SHARDS / name, size, num_bytes)
            except (OSError, ValueError) as error:
                _log.warning("%s is left out of the cache: %s", folder / SHARDS / name, error)
                continue
        keys.append(found)
        offsets.append(places)
        shard_of.append(np.full(len(found), len(shards), dtype=np.int32))
        shards.append((name, size))
    table = np.concatenate([np.zeros(0, dtype=_KEYS), *keys])
    # Stable: of an image that two runs have cached, the first shard's counts.
    order = np.argsort(table, kind="stable")
    return Index(
        tuple(shards),
        table[order],
        np.concatenate([np.zeros(0, dtype=np.int32), *shard_of])[order],
        np.concatenate([np.zeros(0, dtype=np.int64), *offsets])[order],
    )


def damaged_shards(folder: Path, num_bytes: Callable[[bytes], int]) -> list[Path]:
    """Files among the shards that are none, or cut short: not by a killed process, which leaves no such file."""
    known, found = _stored(folder / INDEX), []
    for entry in _shards(folder / SHARDS):
        size = entry.stat().st_size
        try:
            if (entry.name, size) not in known:
                _shard_entries(folder / SHARDS / entry.name, size, num_bytes)
        except ValueError:
            found.append(folder / SHARDS / entry.name)
    return found


def write_index(folder: Path, index: Index) -> None:
    """Keep an index in one file, which has its name only when it is whole. Equal indexes make equal files."""
    partial = folder / f".{INDEX}.{uuid.uuid4().hex}.partial"
    arrays = {
        "keys": np.ascontiguousarray(index.keys).view(np.uint8),
        "offsets": index.offsets,
        "shard_of": index.shard_of,
    }
    try:
        save_file(arrays, partial, {"shards": json.dumps(index.shards)})
        partial.replace(folder / INDEX)
    finally:
        partial.unlink(missing_ok=True)


def _shards(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    return [entry for entry in os.scandir(folder) if entry.name.endswith(".safetensors") and entry.name[0] != "."]


def _stored(path: Path) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(name, bytes) of each shard that the index file knows → its keys and offsets; nothing where there is no file."""
    try:
        with safe_open(path, framework="numpy") as file:
            shards = [(name, size) for name, size in json.loads(file.metadata()["shards"])]
            keys = file.get_tensor("keys").view(_KEYS)
            offsets, shard_of = file.get_tensor("offsets"), file.get_tensor("shard_of")
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is not used, the shards are read instead: %s", path, error)
        return {}
    order = np.argsort(shard_of, kind="stable")
    borders = np.searchsorted(shard_of[order], np.arange(len(shards) + 1))
    parts = [order[start:end] for start, end in zip(borders, borders[1:], strict=False)]
    return {shard: (keys[part], offsets[part]) for shard, part in zip(shards, parts, strict=True)}


def _shard_entries(path: Path, size: int, num_bytes: Callable[[bytes], int]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets of a shard's tensors. Raises ValueError if it is cut short or holds anything else."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError("it is cut short")
        header = json.loads(file.read(length))
    keys, offsets, end = [], [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        key, (start, stop) = key_of_name(name), entry["data_offsets"]
        if stop - start != num_bytes(key):
            raise ValueError(f"{name} has {stop - start} bytes instead of {num_bytes(key)}")
        keys.append(key)
        offsets.append(8 + length + start)
        end = max(end, stop)
    if 8 + length + end != size:
        raise ValueError("it is cut short")
    return np.array(keys, dtype=_KEYS), np.array(offsets, dtype=np.int64)
