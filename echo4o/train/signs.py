"""Signs of life: what a rank tells of itself, whether a process still exists, how long something has not changed."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echo4o.launch import process_state, start_time

HEARTBEAT_FOLDER = "heartbeats"
#: A rank this many times slower than the median is named.
STRAGGLER_FACTOR = 1.5


@dataclass(frozen=True)
class Identity:
    """One process of the run.

    Attributes:
        started: when it was started, in the kernel's ticks; a process number may be used again.
        place: boot and process-number space. Two containers of one machine may share a host name, and yet one's number
            7 is not the other's. Empty where the system does not tell.
    """

    rank: int
    host: str
    pid: int
    started: str
    place: str

    @classmethod
    def of_this_process(cls, rank: int, host: str) -> Identity:
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            place = ""
        return cls(rank, host, pid, start_time(pid), place)

    def is_neighbour_of(self, other: Identity) -> bool:
        """Whether one can see if the other exists."""
        return bool(self.place) and self.place == other.place

    def exists(self) -> bool:
        """Whether this process is still there; only on its own machine. One that is dead but not yet reaped is not."""
        try:
            state, started = process_state(self.pid)
        except OSError:
            return False
        return state not in "ZX" and started == self.started

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class Beat:
    """Where a rank stands.

    Attributes:
        count: grows with every beat, so that two looks at a living rank differ.
        progress: reports of progress so far. Ranks pass the same phases: the smallest number is furthest behind.
    """

    count: int
    step: int
    phase: str
    progress: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))

    @property
    def where(self) -> str:
        return f"'{self.phase}' of step {self.step}"


class Unchanged:
    """For how many seconds a value has been the same, seen from a thread that looks every so often.

    Args:
        longest_look: what one look may add. While this process is suspended it sees nothing, and must not conclude
            from that.
    """

    def __init__(self, longest_look: float) -> None:
        self._longest_look = longest_look
        self._value: object = self
        self._seconds = 0.0
        self._looked = 0.0

    def seconds(self, value: object) -> float:
        now = time.monotonic()
        if value != self._value:
            self._value, self._seconds = value, 0.0
        else:
            self._seconds += min(now - self._looked, self._longest_look)
        self._looked = now
        return self._seconds


def write_heartbeat(results_dir: Path, identity: Identity, beat: Beat, seconds_since_progress: float) -> None:
    """``heartbeats/rank_00000.json``: for people and schedulers that watch from outside.

    Raises:
        OSError: if it cannot be written.
    """
    values: dict[str, Any] = {
        "step": beat.step,
        "phase": beat.phase,
        "time": time.time(),
        "seconds_since_progress": round(seconds_since_progress, 1),
        "rank": identity.rank,
        "host": identity.host,
        "pid": identity.pid,
    }
    path = results_dir / HEARTBEAT_FOLDER / f"rank_{identity.rank:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(values) + "\n")
    partial.replace(path)


def furthest_behind(beats: Mapping[int, Beat]) -> list[int]:
    """Ranks that lag behind all others; none where all stand at the same point."""
    fewest = min(beat.progress for beat in beats.values())
    behind = [rank for rank, beat in sorted(beats.items()) if beat.progress == fewest]
    return behind if len(behind) < len(beats) else []


def stragglers(seconds_by_rank: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """Ranks that keep the others waiting, in words.

    Args:
        seconds_by_rank: each rank's own work in an interval, without waiting for others.

    Two ranks are compared with each other, four and more with their median; of three none is told.
    """
    count = len(seconds_by_rank)
    if count == 2:
        typical = min(seconds_by_rank)
    elif count >= 4:
        typical = statistics.median(seconds_by_rank)
    else:
        return []
    return [
        f"rank {rank} on host {host} takes {seconds / typical:.1f} × as long as usual "
        f"({seconds:.1f} s, not {typical:.1f} s)"
        for rank, (seconds, host) in enumerate(zip(seconds_by_rank, hosts, strict=True))
        if typical > 0 and seconds > STRAGGLER_FACTOR * typical
    ]
