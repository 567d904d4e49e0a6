"""A folder that is complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from echo4o.checkpoint.folders import CheckpointError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(out: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end; after an error there is nothing.

    Args:
        num_bytes: that will be written, to refuse a disk without room at once.

    Raises:
        CheckpointError: if `out` exists, another process is writing it, or it cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CheckpointError(f"{out} exists already; choose another --out, or remove it")
    partial = out.with_name(f".{out.name}.partial")
    lock: IO[str] | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(out.with_name(f".{out.name}.lock"), out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _require_room(out.parent, num_bytes)
        with _ended_by_signals():
            yield partial
            _publish(partial, out)
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a part of the path is a file"
        raise CheckpointError(f"cannot write {out}: {reason}{_remedy(error)}") from error
    finally:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(lock.name)
            lock.close()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A batch system's SIGTERM and a terminal that is closed end this process as Ctrl-C does: it tidies up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signals = (signal.SIGTERM, signal.SIGHUP)
    # nohup's choice stands; so does a handler of the program that called.
    free = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]
    for number in free:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


def _locked(path: Path, out: Path) -> IO[str]:
    lock = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the folder is filled
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise CheckpointError(f"another process is writing {out}; wait for it, or choose another --out") from error
    except OSError as error:
        logger.debug("%s cannot be locked: %s", path, error)
    return lock


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free on its disk")


def _publish(partial: Path, out: Path) -> None:
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if out.is_dir():
        out.rmdir()
    os.rename(partial, out)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Make room there, or choose another --out; nothing was left behind"
    return ". Choose another --out; nothing was left behind"
