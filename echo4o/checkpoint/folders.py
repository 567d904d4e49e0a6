"""Folders of training checkpoints: which are complete, which is the newest, which may go.

A checkpoint is complete if its marker is there and every file that the marker lists has its size and, for the small
ones, its hash. It is written under a temporary name and renamed, so that a killed save leaves the others usable.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo4o.checkpoint.weights import write_text

logger = logging.getLogger(__name__)

MARKER = "complete"
LATEST = "latest"
LOCK = ".lock"
#: Seconds that a run waits for another to leave its folder: a restarted one for its predecessor.
LOCK_PATIENCE = 20.0
FORMAT = 2
_STEP_NAME = re.compile(r"\d{7,}")
_REMAINS = re.compile(r"\d{7,}\.(partial|replaced)")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message names the fix."""


def step_folder(checkpoint_dir: str | Path, step: int) -> Path:
    return Path(checkpoint_dir) / f"{step:07d}"


@contextlib.contextmanager
def claimed(checkpoint_dir: str | Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep other runs out of a folder of checkpoints: two would remove and replace each other's. The claim ends with
    the process, however it ends. File systems without locks do without it.

    Raises:
        CheckpointError: if another run has it for longer than `patience` seconds.
    """
    path = Path(checkpoint_dir) / LOCK
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise CheckpointError(
                        f"another run ({file.read().strip() or 'unknown'}) writes into {checkpoint_dir}: wait for its "
                        "end, stop it, or choose another --checkpoint_dir"
                    ) from error
                time.sleep(0.2)
            except OSError as error:
                logger.debug("%s cannot be locked: %s", path, error)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


# ---------------------------------------------------------------- publish


def publish(partial: Path, folder: Path, step: int) -> None:
    """Sync everything in `partial`, mark it complete and give it its name.

    Raises:
        OSError: if that fails; a checkpoint of the same step is untouched then.
    """
    if unusable := _unusable_entries(partial):
        raise OSError(f"{unusable[0]} is neither a file nor a folder (a dangling link?)")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    content = {
        "format": FORMAT,
        "step": step,
        "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
        "sha256": {str(path.relative_to(partial)): digest for path in files if (digest := fingerprint(path))},
    }
    write_text(partial / MARKER, json.dumps(content, indent=1))
    for path in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(path)
    replaced = folder.with_name(f"{folder.name}.replaced")
    restore_replaced(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_to_latest(folder.parent)


def fingerprint(path: Path) -> str | None:
    """SHA-256 of a JSON or YAML file, or of a safetensors file's header (names, shapes, offsets); None for others."""
    if path.suffix in (".json", ".yaml"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix != ".safetensors":
        return None
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return hashlib.sha256(start + file.read(min(length, 1 << 30))).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _point_to_latest(checkpoint_dir: Path) -> None:
    """``latest`` is a link to the newest complete checkpoint, replaced in one step; absent where there is none."""
    link, found = checkpoint_dir / LATEST, steps(checkpoint_dir)
    with contextlib.suppress(OSError):  # file systems without links do without it
        if not found:
            link.unlink(missing_ok=True)
            return
        partial = checkpoint_dir / f".{LATEST}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(step_folder("", found[-1]).name, target_is_directory=True)
        os.replace(partial, link)


# ---------------------------------------------------------------- find and clean up


def is_complete(folder: str | Path) -> bool:
    return not faults(folder)


def faults(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint folder; empty if it is complete."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} does not exist"]
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, size in marker["files"].items()}
        digests: dict[str, Any] = marker.get("sha256", {})
    except FileNotFoundError:
        return [
            f"{folder} has no {MARKER} marker: its save was interrupted, or it is not one of our training checkpoints"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MARKER} is unreadable ({error})"]
    found = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif name in digests and fingerprint(path) != digests[name]:
            found.append(f"{name} has other content than when it was written")
    return found + [f"{name} is a dangling link" for name in _unusable_entries(folder) if name not in sizes]


def _unusable_entries(folder: Path) -> list[str]:
    """Names below `folder` that are neither files nor folders, links followed."""
    entries = sorted(folder.rglob("*"))
    return [str(path.relative_to(folder)) for path in entries if not path.is_file() and not path.is_dir()]


def restore_replaced(checkpoint_dir: str | Path) -> None:
    """Give back its name to a checkpoint whose replacement was killed between moving it away and taking its place."""
    for path in Path(checkpoint_dir).glob("*.replaced"):
        target = path.with_suffix("")
        if _REMAINS.fullmatch(path.name) and not target.exists():
            os.rename(path, target)
            logger.warning("%s: its replacement was interrupted; the checkpoint is back under its name", target)


def steps(checkpoint_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; other names and incomplete folders are passed over."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name)]
    return sorted(int(path.name) for path in named if is_complete(path))


def latest(checkpoint_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None. Newer ones that are incomplete are named in a warning."""
    restore_replaced(checkpoint_dir)
    found = steps(checkpoint_dir)
    for path in sorted(Path(checkpoint_dir).glob("[0-9]*")):
        if _STEP_NAME.fullmatch(path.name) and path.is_dir() and int(path.name) > max(found, default=-1):
            logger.warning("%s is passed over: %s", path, "; ".join(faults(path)[:3]))
    return step_folder(checkpoint_dir, found[-1]) if found else None


def prune(checkpoint_dir: str | Path, keep_last_n: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep_last_n` complete checkpoints (0: remove none), and remains of killed saves.

    Args:
        keep_every: steps that are multiples of it stay (0: none beyond the newest).
    """
    restore_replaced(checkpoint_dir)
    for path in Path(checkpoint_dir).iterdir():
        if _REMAINS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    old = steps(checkpoint_dir)[:-keep_last_n] if keep_last_n > 0 else []
    for step in old if not keep_every else [step for step in old if step % keep_every]:
        folder = step_folder(checkpoint_dir, step)
        try:
            # Without its marker a half-removed folder is nobody's latest.
            (folder / MARKER).unlink()
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", folder, error)


def set_aside_later(checkpoint_dir: str | Path, step: int) -> Path | None:
    """Move checkpoints beyond `step` into ``earlier_run_N``, so that a run starting there cannot be confused with them.

    Returns:
        The folder they are in now, None if there were none.
    """
    checkpoint_dir = Path(checkpoint_dir)
    later = [step_folder(checkpoint_dir, other) for other in steps(checkpoint_dir) if other > step]
    if not later:
        return None
    number = next(n for n in range(1, 1_000_000) if not (checkpoint_dir / f"earlier_run_{n}").exists())
    target = checkpoint_dir / f"earlier_run_{number}"
    target.mkdir()
    for folder in later:
        os.rename(folder, target / folder.name)
    _point_to_latest(checkpoint_dir)
    return target
