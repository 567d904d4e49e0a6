"""Ending the worker processes of a DataLoader for certain.

PyTorch ends workers that do not answer by SIGTERM, and so does multiprocessing at exit, where it then waits without
limit. Ours are started with SIGTERM blocked, so that a scheduler's signal does not kill them in mid-step; nothing but
SIGKILL ends those that hang.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data._utils import signal_handling

#: Seconds that workers have to end by themselves before they are killed.
GRACE = 10.0
#: The same after one of them died or hangs.
SHORT_GRACE = 1.0


class Closable(Protocol):
    """What is to be closed before the interpreter exits."""

    def close(self) -> None: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(owner: Closable) -> None:
    """Close `owner` before multiprocessing waits for its children, in case nobody does so earlier."""
    _open.add(owner)
    # Last registered, first called: before the exit functions of multiprocessing and torch, already registered.
    atexit.unregister(_close_open)
    atexit.register(_close_open)


def _close_open() -> None:
    for owner in list(_open):
        owner.close()


def end_workers(iterator: Iterator[Any], grace: float = GRACE) -> None:
    """Stop the worker processes of a DataLoader's iterator: gracefully, and by SIGKILL once `grace` seconds are over.

    Does nothing without worker processes, or in a process that did not start them.
    """
    workers = [worker for worker in getattr(iterator, "_workers", ()) if worker._parent_pid == os.getpid()]
    if not workers:
        return
    if iterator._worker_pids_set:  # type: ignore[attr-defined]
        # Otherwise torch's SIGCHLD handler raises about each process that is killed here.
        signal_handling._remove_worker_pids(id(iterator))  # pyright: ignore[reportPrivateImportUsage]
        iterator._worker_pids_set = False  # type: ignore[attr-defined]
    kill = threading.Timer(grace, lambda: [worker.kill() for worker in workers])
    kill.daemon = True
    kill.start()
    try:
        iterator._shutdown_workers()  # type: ignore[attr-defined]
    finally:
        kill.cancel()
        for worker in workers:
            worker.kill()
            worker.join()
