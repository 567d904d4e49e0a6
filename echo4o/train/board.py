"""A notice board for all ranks, in the store of the rendezvous: everyone's beat, and the one failure of the run.

One thread owns the connection: a store's client serves one thread at a time, and may wait for ever if the machine that
holds the store is gone. Nobody else waits for longer than they say.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from echo4o.train.failures import Failure
from echo4o.train.signs import Beat, Unchanged

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

FAILURE, HEARD = "failure", "heard"
#: Beats that a rank may miss before it is suspected, once a collective operation has failed.
MISSED_BEATS = 5


class Board:
    """One rank's view of the board.

    Args:
        connect: opens a connection whose keys are this start's own.
        beat: this rank's beat, now.
        silent: called with (rank, its last beat, seconds) when one gives no sign of life.

    Attributes:
        failure: the failure of the run, once known.
        known: set together with it.
        last_contact: when the store answered last (monotonic clock).
        heard: set once every rank knows of the failure.
        beats: the last one of each rank that was looked at.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],  # pyright: ignore[reportPrivateImportUsage]
        rank: int,
        world_size: int,
        *,
        interval: float,
        dead_rank_timeout: float,
        beat: Callable[[], Beat],
        silent: Callable[[int, Beat, float], Failure],
    ) -> None:
        self.failure: Failure | None = None
        self.known, self.heard = threading.Event(), threading.Event()
        self.last_contact = time.monotonic()
        self.beats: dict[int, Beat] = {}
        self._connect, self._beat, self._silent = connect, beat, silent
        self._rank, self._world_size = rank, world_size
        self._interval, self._dead_rank_timeout = interval, dead_rank_timeout
        self._store: dist.Store | None = None  # pyright: ignore[reportPrivateImportUsage]
        self._proposal: Failure | None = None
        self._looking_around = self._told = False
        self._unchanged: dict[int, Unchanged] = {}
        self._wake, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)

    def post_first_beat(self) -> None:
        """Before anyone looks for it; ranks must meet between this and `start`."""
        store = self._store = self._connect()
        store.set(f"beat/{self._rank}", self._beat().to_json())

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._interval)

    def propose(self, failure: Failure, patience: float) -> bool:
        """Make this the failure of the run, unless there is one.

        Returns: whether the board has decided (`failure` tells for whom); False if it did not answer in time.
        """
        self._proposal = failure
        self._wake.set()
        return self.known.wait(patience)

    def look_around(self) -> None:
        """From now on watch all ranks instead of one, and with little patience: something is known to be wrong."""
        self._looking_around = True
        self._wake.set()

    def decide_alone(self, failure: Failure) -> None:
        """The store does not answer: this failure counts for this rank, and there is nobody to wait for."""
        self.failure = failure
        self.known.set()
        self.heard.set()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._end.is_set() and not self.heard.is_set():
            try:
                self._exchange() if self.failure is None else self._part()
                self.last_contact = time.monotonic()
            except (RuntimeError, OSError) as error:
                if not self._end.is_set():
                    logger.info("the store of the rendezvous does not answer: %s", error)
                self._store = None
                self._end.wait(self._interval)
            self._wake.wait(self._interval if self.failure is None else self._interval / 10)
            self._wake.clear()

    def _exchange(self) -> None:
        store = self._store = self._store or self._connect()
        store.set(f"beat/{self._rank}", self._beat().to_json())
        if self._proposal is not None:
            self._learn(store.compare_set(FAILURE, "", self._proposal.to_json()))
        elif store.check([FAILURE]):
            self._learn(store.get(FAILURE))
        elif self._looking_around:
            self._watch(store, range(self._world_size), MISSED_BEATS * self._interval)
        else:
            # A ring: whatever the number of ranks, each costs the store the same.
            self._watch(store, [(self._rank + 1) % self._world_size], self._dead_rank_timeout)

    def _learn(self, text: bytes) -> None:
        self.failure = self.failure or Failure.from_json(text)
        self.known.set()
        self._wake.set()

    def _part(self) -> None:
        """Tell that the failure was heard of, and see who else has: the store may end with a rank that leaves."""
        store = self._store = self._store or self._connect()
        if store.add(HEARD, 0 if self._told else 1) >= self._world_size:
            self.heard.set()
        self._told = True

    def _watch(self, store: dist.Store, ranks: Iterable[int], patience: float) -> None:  # pyright: ignore[reportPrivateImportUsage]
        ranks = list(ranks)
        texts = store.multi_get([f"beat/{rank}" for rank in ranks])
        beats = {rank: Beat.from_json(text) for rank, text in zip(ranks, texts, strict=True)}
        for rank, beat in beats.items():
            unchanged = self._unchanged.setdefault(rank, Unchanged(2 * self._interval))
            seconds = unchanged.seconds(beat.count)
            if seconds > patience and self._proposal is None:
                self._proposal = self._silent(rank, beat, seconds)
                self._wake.set()
        self.beats = self.beats | beats
