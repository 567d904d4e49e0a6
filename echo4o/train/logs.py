"""One log file a rank, ``logs/rank_00000.log``; the console belongs to rank 0.

Crashes in native code (a segmentation fault, an abort) leave the stacks of all threads in the same file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import time
from pathlib import Path

LOG_FOLDER = "logs"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def rank_log_path(results_dir: str | Path, rank: int) -> Path:
    return Path(results_dir) / LOG_FOLDER / f"rank_{rank:05d}.log"


class RankLog:
    """The open log file of this rank.

    `write` and `dump_stacks` go past `logging`, whose locks a thread that hangs may hold.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("a", encoding="utf-8")
        self._handler = logging.StreamHandler(self.file)
        self._handler.setFormatter(logging.Formatter(FORMAT))
        self._silenced: list[logging.Handler] = []

    def write(self, text: str) -> None:
        if not self.file.closed:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(self.file.fileno(), f"{stamp} {text.rstrip()}\n".encode())

    def dump_stacks(self) -> None:
        """Where every thread of this process stands."""
        if not self.file.closed:
            faulthandler.dump_traceback(self.file, all_threads=True)

    def attach(self, *, with_console: bool) -> None:
        """Send all log records and crash reports here; without a console, only here."""
        root = logging.getLogger()
        root.addHandler(self._handler)
        if not with_console:
            self._silenced = [handler for handler in root.handlers if _writes_to_console(handler)]
            for handler in self._silenced:
                root.removeHandler(handler)
            logging.captureWarnings(True)
        faulthandler.enable(self.file, all_threads=True)

    def close(self) -> None:
        """Everything as it was before `attach`."""
        root = logging.getLogger()
        root.removeHandler(self._handler)
        for handler in self._silenced:
            root.addHandler(handler)
            logging.captureWarnings(False)
        self._silenced = []
        faulthandler.disable()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable(sys.__stderr__ or sys.stderr)
        self.file.close()

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def set_up_logs(results_dir: str | Path, rank: int, world_size: int) -> RankLog:
    """Open this rank's log file, after those of earlier starts, and log into it; ranks but the first only there.

    Raises:
        OSError: if the file cannot be written.
    """
    log = RankLog(rank_log_path(results_dir, rank))
    log.write(f"---- rank {rank} of {world_size}, pid {os.getpid()}: {' '.join(sys.argv[:1])}")
    log.attach(with_console=rank == 0)
    return log


def _writes_to_console(handler: logging.Handler) -> bool:
    return type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.stdout)
