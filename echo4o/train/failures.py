"""One readable message for whatever ends a run of several processes: which rank, on which host, why, and what to do.

The rank that fails claims the one failure of the run (`echo4o.train.liveness`) and prints it. The others then get
errors out of their collective operations that say nothing of the cause: those go to their log files, and the ranks
exit quietly. Nothing here imports torch, so that the command line may.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echo4o.train.liveness import Liveness
    from echo4o.train.processes import Processes

#: Errors whose message names the fix, so that no traceback is shown; by name, because their modules import torch.
USER_ERRORS = (
    "ConfigError",
    "DataError",
    "CheckpointError",
    "NonFiniteError",
    "KernelError",
    "RunError",
    "RendezvousError",
)

#: What gloo, NCCL and the store say when another process is gone or does not answer.
PEER_ERROR_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
PEER_ERROR_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "gloo/transport",
    "timed out waiting",
    "monitoredbarrier",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
)
MAX_REASON = 300


class PeerFailure(RuntimeError):
    """The run has failed elsewhere, and the message was printed there: leave quietly."""


@dataclass(frozen=True)
class Failure:
    """Why the run ends.

    Attributes:
        rank: who says so, which is not always who failed.
        message: for people: rank, host, cause and remedy, one or several lines.
    """

    rank: int
    message: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        return cls(**json.loads(text))


@contextmanager
def reporting_failures(processes: Processes, liveness: Liveness | None = None) -> Iterator[None]:
    """Turn an error inside into one message for all ranks and an exit status; wait for all ranks at a good end.

    In a run of one process errors pass unchanged. May be nested: put it around the loop, so that a failure is announced
    before anything is tidied up, and once more around everything.

    Args:
        liveness: None before the process group exists; then one rank of each host prints its error.

    Raises:
        SystemExit: with status 2 for wrong settings, 130 for Ctrl-C, 1 for all else.
    """
    try:
        yield
        if liveness is not None:
            # Together: whoever is gone while others still train counts as dead.
            processes.barrier()
    except (Exception, KeyboardInterrupt) as error:
        if processes.world_size == 1:
            raise
        raise SystemExit(_report(error, processes, liveness)) from error


def exit_status(error: BaseException) -> int:
    """130 for Ctrl-C, 2 for wrong settings, 1 for all else."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if type(error).__name__ == "ConfigError" else 1


def is_peer_error(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, comes from a collective operation: some other rank is to blame."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if type(seen).__name__ in PEER_ERROR_TYPES:
            return True
        if isinstance(seen, (RuntimeError, OSError)) and any(words in text for words in PEER_ERROR_TEXTS):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def first_line(error: BaseException) -> str:
    """The gist of an error, for a message of another rank's failure."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"


def describe(error: BaseException, who: str) -> str:
    """The message for an error of this rank: a user's error as it stands, others with their traceback."""
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted ({who})"
    if kind in USER_ERRORS and not os.environ.get("ECHO4O_TRACEBACK"):
        return f"{kind}: {error}\n  ({who})"
    return f"{_traceback(error)}{who} failed: {kind}: {first_line(error)}"


def _report(error: BaseException, processes: Processes, liveness: Liveness | None) -> int:
    who = processes.name
    if liveness is None:
        from echo4o.launch import first_on_this_host, name_of_start

        if first_on_this_host(f"{name_of_start()}-early"):
            print(describe(error, who), file=sys.stderr, flush=True)
        return exit_status(error)
    liveness.log(_traceback(error))
    if isinstance(error, PeerFailure):
        return 1
    if is_peer_error(error):
        liveness.blame(first_line(error))
        return 1
    liveness.announce(describe(error, who))
    return exit_status(error)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
