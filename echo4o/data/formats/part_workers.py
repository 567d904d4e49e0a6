"""Worker processes that convert parts. They end with the process that started them, however it ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.formats.parts import Job, convert_part

_POLL_SECONDS = 0.25
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
        for index in todo:
            _reporting_disk(job, index, progress)
            yield index
        return
    crew = _Crew(job, min(num_workers, len(todo)))
    try:
        yield from crew.convert(todo, progress)
    finally:
        crew.end()


class _Crew:
    def __init__(self, job: Job, num_workers: int) -> None:
        # A fork shares what the store has read; threads that Arrow or a progress bar have started do not survive one,
        # so it comes first. Elsewhere the store travels by pickle.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._done = context.RawArray("q", 2 * num_workers)
        self._told = [0, 0]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            arguments = (job, theirs, self._done, 2 * number, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def convert(self, todo: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[int]:
        waiting = list(reversed(todo))
        busy: set[Connection] = set()
        for pipe in self._pipes:
            pipe.send(waiting.pop())
            busy.add(pipe)
        while busy:
            ready = wait([*busy, *(process.sentinel for process in self._processes)], _POLL_SECONDS)
            self._tell(progress)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                index = self._result(pipe)
                if waiting:
                    pipe.send(waiting.pop())
                else:
                    busy.remove(pipe)
                yield index
            if any(not process.is_alive() for process in self._processes):
                self._report_death(busy)
        self._tell(progress)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _tell(self, progress: Callable[[int, int], None]) -> None:
        totals = [sum(self._done[0::2]), sum(self._done[1::2])]
        progress(totals[0] - self._told[0], totals[1] - self._told[1])
        self._told = totals

    @staticmethod
    def _result(pipe: Connection) -> int:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise _killed() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _report_death(self, busy: set[Connection]) -> None:
        for pipe in busy:  # why it ended, if it could still say so
            if pipe.poll():
                self._result(pipe)
        raise _killed()


def _killed() -> DataError:
    return DataError(
        "a worker process was killed, perhaps for want of memory. Run the same command again: finished parts are kept. "
        "Fewer --workers take less memory."
    )


def _work(job: Job, pipe: Connection, done: Any, place: int, parent: int) -> None:
    """Convert the parts that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    job.workspace.leave_lock_to_parent()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def advance(rows: int, num_bytes: int) -> None:
        done[place] += rows
        done[place + 1] += num_bytes

    while True:
        try:
            index = pipe.recv()
        except EOFError:
            return
        try:
            _reporting_disk(job, index, advance)
        except Exception as error:
            pipe.send(error if isinstance(error, DataError) else _as_text(error))
            return
        pipe.send(index)


def _as_text(error: Exception) -> Exception:
    """An error that surely travels, with where it came from."""
    import traceback

    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"a worker process failed:\n{lines}")


def _reporting_disk(job: Job, index: int, advance: Callable[[int, int], None]) -> None:
    """Convert a part. Raises DataError where its files cannot be written."""
    try:
        convert_part(job, index, advance)
    except OSError as error:
        raise disk_error(job, error) from error


def disk_error(job: Job, error: OSError) -> DataError:
    if error.errno in _DISK_ERRORS:
        free = _free_megabytes(job)
        return DataError(
            f"the disk of {job.workspace.final.parent} is full ({free:.0f} MB free). Make room and run the same "
            "command again: finished parts are kept."
        )
    return DataError(f"cannot write {job.workspace.final}: {error}. Run the same command again to go on.")


def _free_megabytes(job: Job) -> float:
    import shutil

    return shutil.disk_usage(job.workspace.final.parent).free / 1e6


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
