"""Stop signals: SIGTERM, SIGUSR1 (pre-emption) and the first Ctrl-C let the current step finish, save and exit cleanly.

A second Ctrl-C ends the run at once, without saving. A clean stop takes bounded time, and leaves ``stopped.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "stopped.json"


class StopRequest:
    """Installed while used as a context manager; does nothing outside the main thread.

    Python tells the main thread of a signal only when it comes back from native code. If that is a collective operation
    that never ends, it does not come back: so the time limit has a thread of its own, which the system wakes.

    Args:
        grace: seconds from the signal to the end of the process; None: no limit.
        give_up: called with a message, from that thread, when they have passed; it must end the process.

    Attributes:
        reason: name of the signal received, or None.
    """

    def __init__(self, grace: float | None = None, give_up: Callable[[str], object] | None = None) -> None:
        self.reason: str | None = None
        self._grace, self._give_up = grace, give_up or _exit
        self._interrupted = False
        self._previous: dict[int, object] = {}
        self._wakeup: tuple[int, int] | None = None
        self._finished = threading.Event()
        self._limit = threading.Thread(target=self._limit_time, name="stop limit", daemon=True)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            if self._grace is not None:
                self._wakeup = os.pipe()
                os.set_blocking(self._wakeup[1], False)
                signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
                self._limit.start()
            self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._finished.set()
            os.close(self._wakeup[1])
            self._limit.join()
            os.close(self._wakeup[0])

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Signals wait until the end; processes started inside never get them.

        A scheduler signals the whole process group: loader workers that died of it would break the step that is to be
        finished and saved. They end when the loader closes.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            # Not through sys.stderr, which the interrupted code may be writing to.
            os.write(2, b"\nCtrl-C: finishing this step and saving; once more ends at once, without saving\n")
        self.reason = signal.Signals(number).name

    def _limit_time(self) -> None:
        """Wait for a stop signal (or the end of the context), then for the end of the process."""
        assert self._wakeup is not None and self._grace is not None
        while received := os.read(self._wakeup[0], 1):
            if received[0] in STOP_SIGNALS:
                break
        else:
            return
        if not self._finished.wait(self._grace):
            name = signal.Signals(received[0]).name
            self._give_up(
                f"{name} was received {self._grace:.0f} s ago, and the run has not come to its end: it gives up. The "
                "checkpoint before is untouched; --auto_resume True continues from it. If saving takes that long, "
                "raise --stop_grace, and the time that the scheduler leaves."
            )


def write_stop_marker(results_dir: str | Path, reason: str, step: int, checkpoint: str | Path) -> None:
    """Tell whoever started this run that it was stopped, not finished, and where it goes on. Rank 0, after the save.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(results_dir) / STOP_FILE
    values = {"reason": reason, "step": step, "checkpoint": str(checkpoint), "time": time.time()}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(values) + "\n")
    partial.replace(path)


def remove_stop_marker(results_dir: str | Path) -> None:
    """A new start is not a stopped run. Rank 0."""
    (Path(results_dir) / STOP_FILE).unlink(missing_ok=True)


def _exit(message: str) -> None:
    os.write(2, f"\n{message}\n".encode())
    sys.stdout.flush()
    os._exit(1)
