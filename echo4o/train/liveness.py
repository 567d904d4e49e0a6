"""Is every rank alive, and does it get on? If not, the whole run ends soon, with one message.

Three ways to notice that a rank is lost, because none serves everywhere: its collective operations fail (gloo, at once;
NCCL often waits for ever instead), its process no longer exists (for ranks of the same machine), its beats on the board
stop (for all others). A rank that lives but makes no progress is found by its own watcher. What was noticed first
becomes the one failure of the run; every rank that learns of it leaves within seconds, by force if its main thread is
stuck in a collective operation.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import NoReturn

from echo4o.launch import first_on_this_host
from echo4o.train.board import MISSED_BEATS, Board
from echo4o.train.failures import Failure, PeerFailure
from echo4o.train.logs import RankLog, rank_log_path
from echo4o.train.processes import Processes, rendezvous_address
from echo4o.train.signs import Beat, Identity, Unchanged, furthest_behind, write_heartbeat

logger = logging.getLogger(__name__)

#: Seconds between beats, unless dead_rank_timeout asks for more haste.
BEAT_INTERVAL = 1.0
#: Seconds that the main thread has to leave on its own once the run has failed.
EXIT_GRACE = 5.0
#: Seconds to wait for the board's decision.
BOARD_PATIENCE = 3.0
#: Beats to wait until the other ranks know of a failure, before leaving; the store may end with this process.
HEARING = 2.5
#: Ranks that one message names.
MAX_NAMED = 8
RESUME = "Continue with --auto_resume True."


class Liveness:
    """Use as a context manager around everything after `Processes.start`, on all ranks.

    In a run of one process only the heartbeat file and the hang watchdog remain.

    Args:
        log: where stacks and the details of other ranks' failures go.
        hang_timeout: seconds without a call of `progress` after which the run ends.
        dead_rank_timeout: seconds without a sign of life after which a rank counts as dead.
        exit_grace: seconds that the main thread has to leave once the run has failed.
    """

    def __init__(
        self,
        processes: Processes,
        results_dir: str | Path,
        log: RankLog,
        *,
        hang_timeout: float = 1800.0,
        dead_rank_timeout: float = 60.0,
        exit_grace: float = EXIT_GRACE,
    ) -> None:
        self.processes = processes
        self.identity = Identity.of_this_process(processes.rank, processes.host)
        self.peers = [self.identity]
        self._results_dir, self._rank_log = Path(results_dir), log
        self._hang_timeout, self._dead_rank_timeout, self._exit_grace = hang_timeout, dead_rank_timeout, exit_grace
        self._interval = min(BEAT_INTERVAL, dead_rank_timeout / 4)
        self._tick = min(self._interval / 2, hang_timeout / 4)
        self._step, self._phase, self._progress = 0, "start", 0
        self._armed_at = self._progressed_at = time.monotonic()
        self._beats = 0
        self._key = ""
        self._board: Board | None = None
        self._failure: Failure | None = None
        self._failure_lock = threading.Lock()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("watcher", self._watch), ("heartbeat", self._write_heartbeats))
        ]

    def __enter__(self) -> Liveness:
        if self.processes.world_size > 1:
            self._key = self.processes.broadcast(f"echo4o-{uuid.uuid4().hex}")
            self._board = Board(
                lambda: self.processes.connect_store(self._key),
                self.processes.rank,
                self.processes.world_size,
                interval=self._interval,
                dead_rank_timeout=self._dead_rank_timeout,
                beat=self._beat,
                silent=self._silent,
            )
            self._board.post_first_beat()
            self.peers = self.processes.gather(self.identity)
            self._board.start()
        self._arm()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, SystemExit) and self.failure is not None:
            # An ordinary end would wait for the process group, whose other ends are gone.
            self._leave(error.code if isinstance(error.code, int) else 1)
        self._end.set()
        if self._board is not None:
            self._board.close()
        for thread in self._threads:
            thread.join(timeout=2 * self._tick)

    # ------------------------------------------------------------ for the trainer

    @property
    def failure(self) -> Failure | None:
        """Why the run ends, as soon as this rank knows."""
        return self._failure or (self._board.failure if self._board is not None else None)

    def progress(self, step: int, phase: str) -> None:
        """Something was done: this rank is in `phase` of `step` now. All ranks report the same phases.

        Raises:
            PeerFailure: if the run has failed elsewhere.
        """
        if (failure := self.failure) is not None:
            raise PeerFailure(failure.message)
        self._step, self._phase, self._progress = step, phase, self._progress + 1
        self._progressed_at = time.monotonic()
        if self._progressed_at - self._armed_at > 1:
            self._arm()

    # ------------------------------------------------------------ failures

    def announce(self, message: str) -> None:
        """This rank ends the run. The message is printed unless another rank was first."""
        failure = Failure(self.processes.rank, message)
        if self._board is not None:
            in_contact = time.monotonic() - self._board.last_contact < MISSED_BEATS * self._interval
            if not (in_contact and self._board.propose(failure, BOARD_PATIENCE)):
                # Without a board the first rank of every host has its say.
                self._board.decide_alone(failure if first_on_this_host(self._key) else Failure(-1, message))
            failure = self._board.failure
        self._settle(failure)

    def blame(self, reason: str) -> None:
        """A collective operation failed here, because of some other rank: find out which, and end the run.

        Args:
            reason: what the operation said.
        """
        if self._board is None:
            return self.announce(reason)
        self._board.look_around()
        if self._board.known.wait((MISSED_BEATS + 3) * self._interval):
            return self._settle(self._board.failure)
        out_of_contact = time.monotonic() - self._board.last_contact
        if out_of_contact > MISSED_BEATS * self._interval:
            return self.announce(self._store_lost(out_of_contact))
        others = [f"rank {rank} in {beat.where}" for rank, beat in sorted(self._board.beats.items())][:MAX_NAMED]
        self.announce(
            f"{self.processes.name} failed in {self._beat().where}: {reason}\n"
            f"  Every rank is alive ({', '.join(others)}{', …' * (len(self.peers) > MAX_NAMED)}). "
            "If a phase may take that long, raise --dist_timeout; otherwise look at the network between the hosts. "
            f"{RESUME}"
        )

    def end(self, message: str) -> NoReturn:
        """End the run from another thread, whatever the main thread is doing; its stacks go to the log."""
        self._dump_stacks()
        self.announce(message)
        self._leave(1)

    def log(self, text: str) -> None:
        """Into this rank's file only."""
        self._rank_log.write(text)

    def _settle(self, failure: Failure | None) -> None:
        """The failure is decided; print it if it is ours. Once, whichever thread comes first."""
        with self._failure_lock:
            if failure is None or self._failure is not None:
                return
            self._failure = failure
        self.log(f"the run has failed: {failure.message}")
        if failure.rank == self.processes.rank:
            # Not through sys.stderr, which a thread that hangs may be writing to.
            os.write(2, f"\n{failure.message}\n".encode())

    def _leave(self, status: int) -> NoReturn:
        """End this process without waiting for more than the others to have heard why."""
        if self._board is not None and self._board.failure is not None:
            self._board.heard.wait(HEARING * self._interval)
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(timeout=1)
        os._exit(status)

    # ------------------------------------------------------------ watching

    def _watch(self) -> None:
        progress, contact = Unchanged(2 * self._tick), Unchanged(2 * self._tick)
        missing: set[int] = set()
        while not self._end.wait(self._tick):
            if self.failure is not None:
                return self._await_end()
            gone = {peer.rank for peer in self.peers if peer.is_neighbour_of(self.identity) and not peer.exists()}
            # Twice, as ranks that leave together at the end do so one after the other.
            if lost := sorted(gone & missing):
                self.announce(self._gone(self.peers[lost[0]]))
                continue
            missing = gone
            if self._board is not None:
                seconds = contact.seconds(self._board.last_contact)
                if seconds > self._dead_rank_timeout:
                    self.announce(self._store_lost(seconds))
                    continue
            if progress.seconds(self._progress) > self._hang_timeout:
                self.end(self._hung())

    def _await_end(self) -> None:
        """The run has failed: let the main thread leave on its own, but not for long."""
        self._settle(self.failure)
        soon = min(1.0, self._exit_grace)
        if not self._end.wait(soon):
            self._dump_stacks()
            self._end.wait(self._exit_grace - soon)
            self._leave(1)

    def _arm(self) -> None:
        """For a thread that holds Python's lock while it hangs, so that the watcher cannot run: stacks and the end."""
        self._armed_at = time.monotonic()
        faulthandler.dump_traceback_later(
            self._hang_timeout + max(10.0, 4 * self._tick), exit=True, file=self._rank_log.file
        )

    def _dump_stacks(self) -> None:
        self.log(f"stacks of {self.identity} in {self._beat().where}:")
        self._rank_log.dump_stacks()

    def _beat(self) -> Beat:
        self._beats += 1
        return Beat(self._beats, self._step, self._phase, self._progress)

    def _write_heartbeats(self) -> None:
        failed = False
        while True:
            try:
                seconds = time.monotonic() - self._progressed_at
                write_heartbeat(self._results_dir, self.identity, self._beat(), seconds)
            except OSError as error:
                if not failed:
                    logger.warning("no heartbeat file: %s", error)
                failed = True
            if self._end.wait(BEAT_INTERVAL):
                return

    # ------------------------------------------------------------ messages

    def _log_of(self, rank: int) -> Path:
        return rank_log_path(self._results_dir, rank)

    def _gone(self, peer: Identity) -> str:
        beat = self._board.beats.get(peer.rank) if self._board is not None else None
        where = f", last seen in {beat.where}" if beat is not None else ""
        return (
            f"{peer} is gone{where}: its process was killed (out of memory? see dmesg) or crashed. "
            f"Its log: {self._log_of(peer.rank)}. {RESUME}"
        )

    def _silent(self, rank: int, beat: Beat, seconds: float) -> Failure:
        peer = self.peers[rank]
        cause = "its process was killed (out of memory?), or its machine is gone or cannot be reached"
        if peer.is_neighbour_of(self.identity) and peer.exists():
            cause = "its process is there, but does not run: suspended, or stuck in native code"
        message = (
            f"{peer} gave no sign of life for {seconds:.0f} s, last in {beat.where}: {cause}. "
            f"Its log: {self._log_of(rank)}. {RESUME}"
        )
        return Failure(self.processes.rank, message)

    def _store_lost(self, seconds: float) -> str:
        return (
            f"{self.processes.name} has lost the rendezvous at {rendezvous_address()}: no answer for {seconds:.0f} s. "
            "That machine is gone or cannot be reached, or the process that holds the rendezvous (torchrun of the "
            f"first node, otherwise rank 0) was killed. {RESUME}"
        )

    def _hung(self) -> str:
        """Ask all ranks where they stand: the one that is behind keeps the others waiting."""
        beats = {self.processes.rank: self._beat()}
        if self._board is not None:
            self._board.look_around()
            self._end.wait(2 * self._interval)
            beats = self._board.beats | beats
        late = furthest_behind(beats) or [self.processes.rank]
        where = [
            f"{self.peers[rank]}: no progress for {self._hang_timeout:.0f} s in {beats[rank].where}; stacks in "
            f"{self._log_of(rank)}"
            for rank in late[:MAX_NAMED]
        ]
        if len(beats) > 1:
            others = "all other ranks wait for it" if len(late) == 1 else "others stand at the same point or wait"
            where.append(f"({others}; stacks of every rank in {self._log_of(0).parent})")
        where.append(f"If a phase may take that long, raise --hang_timeout. {RESUME}")
        return "\n  ".join(where)


def _flush() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
