"""Filling a store: what is to be done in units of a fixed number of images, each of which becomes one shard.

The list of units is written down before the first is begun, so that whoever goes on with a killed run does the same
units: the shards come out as if it had never been killed. A unit is done by whoever holds its lock; the lock of a
process that dies is free. A shard has its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from echo4o.data.errors import DataError
from echo4o.data.latent_cache import IDENTITY, RULES, Identity, read_identity
from echo4o.data.latent_index import SHARDS, Index, damaged_shards, read_index, write_index
from echo4o.data.latent_keys import KEY_BYTES, key_name, key_of_name, rule_file

logger = logging.getLogger(__name__)

_PLANS, _LOCKS = "plans", "locks"
_KEYS = f"S{KEY_BYTES}"


@dataclass(frozen=True)
class Unit:
    """Images that become one shard.

    Attributes:
        name: of the shard file.
        keys: (n,) of the images, in order.
    """

    name: str
    keys: np.ndarray


def open_store(folder: Path, identity: Identity, rules: Sequence[Mapping[str, Any]]) -> None:
    """Make a store's folder, or check that it is of the same encoder; note resize rules. Several processes may call it
    at once.

    Raises:
        DataError: if there is a store of another encoder, or nothing can be written.
    """
    try:
        for name in (RULES, _PLANS, SHARDS, _LOCKS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not (folder / IDENTITY).exists():
            _write_new(folder / IDENTITY, json.dumps(asdict(identity), indent=2) + "\n")
        if changes := read_identity(folder).changes(identity, also_stored=True):
            raise DataError(
                f"{folder} was made otherwise: {'; '.join(changes)}.\n  Choose another --out, or remove {folder} to "
                "make it anew."
            )
        for rule in rules:
            _write_new(folder / RULES / rule_file(rule), json.dumps(rule, sort_keys=True))
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}. Choose another --out.") from error


def list_units(folder: Path, identity: Identity, keys: np.ndarray, unit_size: int) -> list[Unit]:
    """The units that must be done for all `keys` to be in the store; those done already among them.

    Units of an earlier, unfinished run over the same keys are taken up. Images that a finished shard of any run holds
    are in no new unit.
    """
    for path in damaged_shards(folder, identity.num_bytes):
        logger.warning("%s is damaged and made anew", path)
        path.unlink(missing_ok=True)
    index = read_index(folder, identity.num_bytes)
    digest = hashlib.blake2b(np.sort(keys).tobytes(), digest_size=8).hexdigest()
    while True:
        paths = sorted((folder / _PLANS).glob(f"{digest}-*.txt"))
        units = [unit for path in paths for unit in _read_plan(path)]
        covered = np.concatenate([index.keys, *(unit.keys for unit in units)])
        missing = keys[~np.isin(keys, covered)]
        if not len(missing):
            return units
        names = [key_name(key) for key in as_bytes(missing)]
        plan = "\n".join([f"images_per_shard {unit_size}", *names, ""])
        _write_new(folder / _PLANS / f"{digest}-{len(paths):02d}.txt", plan)


def is_done(folder: Path, unit: Unit) -> bool:
    return (folder / SHARDS / unit.name).exists()


@contextlib.contextmanager
def claimed(folder: Path, unit: Unit) -> Iterator[bool]:
    """Whether this process may do a unit; False while another one does it. File systems without locks do without."""
    path = folder / _LOCKS / f"{unit.name}.lock"
    path.parent.mkdir(exist_ok=True)  # another run, at its end, may have removed it
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            logger.debug("no locks in %s: %s", folder, error)
        yield True
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def write_shard(folder: Path, unit: Unit, tensors: Mapping[bytes, Tensor]) -> None:
    """Called by the holder of the unit's claim. Raises DataError if the disk does not take it."""
    shards = folder / SHARDS
    for left_over in shards.glob(f".{unit.name}.*.partial"):  # of a process that was killed
        left_over.unlink(missing_ok=True)
    partial = shards / f".{unit.name}.{uuid.uuid4().hex}.partial"
    try:
        save_file({key_name(key): tensor for key, tensor in tensors.items()}, partial)
        _sync(partial)
        partial.replace(shards / unit.name)
        _sync(shards)
    except Exception as error:  # safetensors has errors of its own for a full disk
        raise DataError(
            f"cannot write {shards / unit.name}: {error}. Make room and start again: what is done stays done."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def close_store(folder: Path, identity: Identity) -> Index:
    """Write the index of everything that is there. Others may go on writing."""
    index = read_index(folder, identity.num_bytes)
    write_index(folder, index)
    for path in (folder / _LOCKS).glob("*.lock"):  # of a process that was killed just after it had written a shard
        if (folder / SHARDS / path.stem).exists():
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: another run is at work
        (folder / _LOCKS).rmdir()
    return index


def do_units(
    folder: Path, units: Sequence[Unit], do: Callable[[Unit], None], first: int, wait: Callable[[], None]
) -> None:
    """Do all units together with the other processes; returns when all are done, whoever did them.

    Args:
        do: makes a unit's shard.
        first: place of the unit to begin with, so that processes begin apart.
        wait: called where nothing can be done but wait for others.
    """
    waiting = [unit for unit in [*units[first:], *units[:first]] if not is_done(folder, unit)]
    while waiting:
        taken = []
        for unit in waiting:
            if is_done(folder, unit):
                continue
            with claimed(folder, unit) as mine:
                if mine and not is_done(folder, unit):
                    do(unit)
                elif not mine:
                    taken.append(unit)
        waiting = taken
        if waiting:
            wait()


def _read_plan(path: Path) -> list[Unit]:
    head, *names = path.read_text(encoding="utf-8").splitlines()
    size = int(head.removeprefix("images_per_shard "))
    keys = np.array([key_of_name(name) for name in names], dtype=_KEYS)
    return [
        Unit(f"{path.stem}-{number:06d}.safetensors", keys[start : start + size])
        for number, start in enumerate(range(0, len(keys), size))
    ]


def as_bytes(keys: np.ndarray) -> Iterator[bytes]:
    """Keys as bytes of full length: numpy takes zeros off the end of a single item."""
    data = np.ascontiguousarray(keys).tobytes()
    return (data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))


def _write_new(path: Path, text: str) -> None:
    """A whole file, unless there is one already."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    except PermissionError:  # file systems without links
        if not path.exists():
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
