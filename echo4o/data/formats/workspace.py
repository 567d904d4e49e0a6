"""The folder in which a converted data set grows: hidden beside its final name, locked, taken up again after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.formats.writers.base import sync_file

#: Folder of the data set that tells where it comes from and what was left out. Hidden, since readers that look for rows
#: below a folder would take its JSON for some.
REPORT_FOLDER = ".conversion"
SUMMARY = f"{REPORT_FOLDER}/summary.json"
SKIPPED = f"{REPORT_FOLDER}/skipped.jsonl"


class Workspace:
    """``.NAME.partial`` beside ``NAME``. Use as a context manager; inside, no other process converts to the same name.

    Attributes:
        build: becomes the data set.
        state: what is known of finished parts.
        temp: unfinished files; emptied at every start.

    Args:
        final: the data set to be.

    Raises:
        DataError: on entering, if another process is at it.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.partial = final.parent / f".{final.name}.partial"
        self.build, self.state, self.temp = (self.partial / name for name in ("out", "state", "temp"))
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        self._lock = self._locked()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def leave_lock_to_parent(self) -> None:
        """In a forked process: the lock must end with the process that took it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, plan: Mapping[str, Any], restart: bool = False) -> None:
        """Take up the unfinished conversion of this plan, or begin it.

        Raises:
            DataError: if what is unfinished has another plan.
        """
        path = self.state / "plan.json"
        if restart:
            self._clear()
        elif path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in {**plan, **found} if plan.get(name) != found.get(name)]
            if differing:
                raise DataError(
                    f"{self.partial} holds an unfinished conversion with other settings: "
                    + "; ".join(f"{name} was {found.get(name)!r}, is {plan.get(name)!r}" for name in differing)
                    + ".\n  Run with the old settings to finish it, or add --restart to begin anew."
                )
        shutil.rmtree(self.temp, ignore_errors=True)
        for folder in (self.build, self.state / "parts", self.temp):
            folder.mkdir(parents=True, exist_ok=True)
        self.record("plan.json", plan)

    def record(self, name: str, values: Any, *, durably: bool = True) -> None:
        """Keep JSON among the state; after a loss of power, what was not kept durably may be gone or unreadable."""
        unfinished = self.temp / f"{os.getpid()}-{Path(name).name}"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(values, file)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        unfinished.rename(self.state / name)

    def finished_parts(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.state / "parts").glob("*.json"))

    def part(self, index: int) -> dict[str, Any]:
        """What was recorded of a finished part. Raises ValueError if that was lost with the power."""
        return json.loads((self.state / part_name(index)).read_text(encoding="utf-8"))

    def forget_part(self, index: int) -> None:
        (self.state / part_name(index)).unlink(missing_ok=True)

    def already_finished(self, plan: Mapping[str, Any]) -> bool:
        """Whether the data set stands under its name, from the same plan.

        Raises:
            DataError: if something else stands there.
        """
        if not self.final.exists() or (self.final.is_dir() and not any(self.final.iterdir())):
            return False
        with_plan = self.final / SUMMARY
        if with_plan.is_file() and json.loads(with_plan.read_text(encoding="utf-8")).get("plan") == plan_hash(plan):
            shutil.rmtree(self.partial, ignore_errors=True)  # killed between the last two steps
            return True
        raise DataError(f"{self.final} exists and is not this conversion's result. Remove it or choose another name.")

    def commit(self) -> None:
        """Give the data set its name."""
        for folder, _, _ in os.walk(self.build):
            sync_file(Path(folder))
        self.build.rename(self.final)
        sync_file(self.final.parent)
        shutil.rmtree(self.partial, ignore_errors=True)

    def abandon_if_empty(self) -> None:
        """Leave nothing behind where nothing was begun."""
        if not (self.state / "plan.json").exists():
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _clear(self) -> None:
        for folder in (self.build, self.state, self.temp):
            shutil.rmtree(folder, ignore_errors=True)

    def _locked(self) -> int:
        path = self.partial / "lock"
        while True:
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # whoever finished just now removed the folder
                continue
            except OSError as error:
                raise DataError(f"cannot write beside {self.final}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise DataError(
                    f"another process is converting to {self.final}. Wait for it, or choose another name."
                ) from error
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)


def part_name(index: int) -> str:
    return f"parts/{index:06d}.json"


def plan_hash(plan: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()


def files_hash(files: Iterator[str] | list[str]) -> str:
    """Of the paths, sizes and times of files: what was begun on other rows is not taken up again."""
    digest = hashlib.blake2b(digest_size=16)
    for name in files:
        try:
            status = os.stat(name)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # a URL
            digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino)
