"""``judgements.jsonl``: one line a judgement, written as it arrives; the latest of a question counts.

Each line is one write to a file opened for appending, so that a killed process leaves whole lines and at most one torn
one, which the next run removes. Lines reach the disk itself (fsync) once a second and at the end: a machine that loses
power loses at most the last second.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from echo4o.evaluate.benchmark import Judgement

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SYNCS = 1.0
_NAMES = tuple(field.name for field in fields(Judgement))
Key = tuple[str, str]
"""(item, question)."""


class JournalError(ValueError):
    """The file of judgements cannot be read or is in use; the message names the line and the remedy."""


class Journal:
    """Appends judgements; only one process at a time may. Use as a context manager.

    Raises:
        JournalError: if another process writes into the file, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: int | None = None
        self._synced = 0.0

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise JournalError(f"another evaluation writes into {self.path}: wait for its end, or stop it") from error
        except OSError as error:
            logger.debug("%s cannot be locked: %s", self.path, error)
        try:
            _mend(self._file, self.path)
            self.known = read_judgements(self.path)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            os.fsync(self._file)
        self._close()

    def add(self, judgement: Judgement) -> None:
        """Write one line; safe from many threads.

        Raises:
            OSError: if it cannot be written; what was written of it is removed.
        """
        assert self._file is not None
        line = (json.dumps(asdict(judgement), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            length = os.fstat(self._file).st_size
            if os.write(self._file, line) != len(line):  # a full disk
                os.ftruncate(self._file, length)
                raise OSError(f"{self.path} cannot be written: is the disk full?")
            self.known.setdefault((judgement.item, judgement.question), []).append(judgement)
            if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def read_judgements(path: Path) -> dict[Key, list[Judgement]]:
    """Every judgement by item and question, the latest last; {} if there is no file.

    A last line without its end is of a run that was killed, or is being written now: it does not count.

    Raises:
        JournalError: naming a line that is damaged.
    """
    found: dict[Key, list[Judgement]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            judgement = Judgement(**{name: row[name] for name in _NAMES if name in row})
            key = (judgement.item, judgement.question)
        except (ValueError, TypeError) as error:
            raise JournalError(f"{path}, line {number}: no judgement ({error}); remove the line") from error
        found.setdefault(key, []).append(judgement)
    return found


def _lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError):
        yield from path.read_bytes().split(b"\n")[:-1]


def _mend(file: int, path: Path) -> None:
    """Remove what a killed process has left of a line; finish one that lacks only its end."""
    length = os.fstat(file).st_size
    content = os.pread(file, length, 0)
    whole = content.rfind(b"\n") + 1
    tail = content[whole:]
    if not tail:
        return
    try:
        json.loads(tail)
    except ValueError:
        logger.info("%s: its last line was not finished; that question is asked again", path)
        os.ftruncate(file, whole)
    else:
        os.write(file, b"\n")
