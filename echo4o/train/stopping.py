"""Stop signals: SIGTERM, SIGUSR1 (pre-emption) and the first Ctrl-C let the current step finish, save and exit cleanly.

A second Ctrl-C ends the run at once, without saving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Installed while used as a context manager; does nothing outside the main thread.

    Attributes:
        reason: name of the signal received, or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

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
