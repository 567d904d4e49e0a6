"""Worker processes that convert parts. They end with the process that started them, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.formats.parts import Job, convert_part

_POLL_SECONDS = 0.25
_PARTS_AT_HAND = 2
_PR_SET_PDEATHSIG = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def convert_parts(
    job: Job, todo: Sequence[int], num_workers: int, progress: Callable[[int, int], None]
) -> Iterator[int]:
    """Convert parts and yield the index of each that is finished.

    Args:
        todo: parts, in order.
        num_workers: processes; 0 and 1 convert in this one.
        progress: told rows and bytes of images that are done since it was last told.

    Raises:
        DataError: if the disk is full or a worker is killed.
    """
    if min(num_workers, len(todo)) <= 1:
        yield from _convert_one_by_one(job, todo, progress)
        return
    crew = _Crew(job, min(num_workers, len(todo)))
    try:
        yield from crew.convert(todo, progress)
    finally:
        crew.end()


def _convert_one_by_one(job: Job, indexes: Iterable[int], progress: Callable[[int, int], None]) -> Iterator[int]:
    """Every part waits for the disk while the next one is converted. Raises DataError where files cannot be written."""
    waiting: tuple[int, Callable[[], None]] | None = None
    try:
        for index in indexes:
            settle = convert_part(job, index, progress)
            if waiting is not None:
                waiting[1]()
                yield waiting[0]
            waiting = index, settle
        if waiting is not None:
            waiting[1]()
            yield waiting[0]
    except OSError as error:
        raise disk_error(job, error) from error


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    parts: int = 0


class _Crew:
    """Each worker has the next part at hand while it converts one."""

    def __init__(self, job: Job, num_workers: int) -> None:
        # A fork shares what the store has read; threads that Arrow or a progress bar have started do not survive one,
        # so it comes first. Elsewhere the store travels by pickle.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._done = context.RawArray("q", 2 * num_workers)
        self._told = [0, 0]
        self._workers: list[_Worker] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            arguments = (job, theirs, self._done, 2 * number, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def convert(self, todo: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[int]:
        indexes = iter(todo)
        for worker in self._workers * _PARTS_AT_HAND:
            self._give(worker, next(indexes, None))
        while busy := {worker.pipe: worker for worker in self._workers if worker.parts}:
            ready = wait(list(busy), _POLL_SECONDS)
            self._tell(progress)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                index = _result(pipe)
                busy[pipe].parts -= 1
                self._give(busy[pipe], next(indexes, None))
                yield index
        self._tell(progress)

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    @staticmethod
    def _give(worker: _Worker, index: int | None) -> None:
        """A part, or ``None``: there are no more."""
        worker.parts += index is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, or has ended with its last part: reading will tell
            worker.pipe.send(index)

    def _tell(self, progress: Callable[[int, int], None]) -> None:
        totals = [sum(self._done[0::2]), sum(self._done[1::2])]
        progress(totals[0] - self._told[0], totals[1] - self._told[1])
        self._told = totals


def _result(pipe: Connection) -> int:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _killed() from error
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _killed() -> DataError:
    return DataError(
        "a worker process was killed, perhaps for want of memory. Run the same command again: finished parts are kept. "
        "Fewer --workers take less memory."
    )


def _work(job: Job, pipe: Connection, done: Any, place: int, parent: int) -> None:
    """Convert the parts that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _end_with(parent)
    job.workspace.leave_lock_to_parent()

    def advance(rows: int, num_bytes: int) -> None:
        done[place] += rows
        done[place + 1] += num_bytes

    try:
        for index in _convert_one_by_one(job, iter(pipe.recv, None), advance):
            pipe.send(index)
    except EOFError:
        return
    except Exception as error:
        pipe.send(error if isinstance(error, DataError) else _as_text(error))


def _as_text(error: Exception) -> Exception:
    """An error that surely travels, with where it came from."""
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"a worker process failed:\n{lines}")


def disk_error(job: Job, error: OSError) -> DataError:
    """What the user can do about files that cannot be written."""
    final = job.workspace.final
    if error.errno in _DISK_ERRORS:
        free = shutil.disk_usage(final.parent).free
        return DataError(
            f"the disk of {final.parent} is full ({free / 1e6:.0f} MB free). Make room and run the same command again: "
            "finished parts are kept."
        )
    return DataError(f"cannot write {final}: {error}. Run the same command again to go on.")


def _end_with(parent: int) -> None:
    """End this process when its parent does: by the kernel where it can, else by looking."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
