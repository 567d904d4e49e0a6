"""When the next call to a judge may start: so many requests and tokens a minute, and not before a server wants it."""

from __future__ import annotations

import random
import threading
import time

MAX_BACKOFF = 60.0


class Stopped(Exception):
    """The run is being stopped: nothing new is to be started."""


class Pace:
    """Shared by all workers; calls are spread evenly over the minute, so that none is refused for a burst.

    Args:
        requests_per_minute, tokens_per_minute: None for no limit.
        stop: once it is set, every wait ends with `Stopped`.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.stop = stop or threading.Event()
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._held_until = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: float = 0.0) -> None:
        """Until one more request of so many tokens may start.

        Raises:
            Stopped: if the run is stopped meanwhile.
        """
        with self._lock:
            begin = max(time.monotonic(), self._next_request, self._next_token)
            self._next_request = begin + self._seconds_per_request
            self._next_token = begin + tokens * self._seconds_per_token
        self._sleep_until(begin)
        while (left := self._held_until - time.monotonic()) > 0:  # may be prolonged meanwhile
            self.sleep(left)

    def hold(self, seconds: float) -> None:
        """Nobody starts anything for so long: a server that is busy is busy for all workers."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Raises Stopped if the run is stopped meanwhile."""
        if self.stop.wait(max(0.0, seconds)):
            raise Stopped

    def _sleep_until(self, moment: float) -> None:
        self.sleep(moment - time.monotonic())


def backoff(attempt: int, base: float) -> float:
    """Seconds before attempt number `attempt` + 1: doubled each time, and spread so that workers do not come back
    together."""
    return min(MAX_BACKOFF, base * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
