"""What has been done in a folder of results: one JSON line a finished request, and one file of them in the end.

While they run, ranks append to ``results.{rank}.jsonl``. A rank that is through moves its lines into
``results.jsonl``, sorted as the requests are; nobody waits for anybody, and what a killed run has written stays: the
first rank of the next run moves it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from echo4o.generate.files import partial_name

logger = logging.getLogger(__name__)

RESULTS = "results.jsonl"
LOCK = ".results.lock"
#: What is no text (a part of a file name, say) becomes an escape of JSON.
_ESCAPED = "backslashreplace"
_OF_RANK = re.compile(r"results\.(\d+)\.jsonl")

Record = Mapping[str, Any]


class Results:
    """The results of a run in `folder`, as one rank of it sees them. Use as a context manager.

    Args:
        run: names the run, the same for all its ranks and no other run's: what ranks of another run have left does not
            count as theirs.

    Raises:
        OSError: if the folder cannot be written, or another run writes into it.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1, run: str = "") -> None:
        self.folder, self.rank, self.world_size, self.run = folder, rank, world_size, run
        self._file: IO[str] | None = None

    def __enter__(self) -> Results:
        path = self.folder / f"results.{self.rank}.jsonl"
        with _locked(self.folder) as state:
            self._file = open(path, "a", encoding="utf-8", errors=_ESCAPED)
            if not _lock(self._file):
                self._file.close()
                raise OSError(f"another run writes into {self.folder}: wait for its end, or choose another --out")
            if state.get("run") != self.run:
                state.update(run=self.run, finished={})
            state["finished"].pop(str(self.rank), None)
            # Later lines replace earlier ones: those of an older run must lie before all of this one's.
            with contextlib.ExitStack() as held:
                left = [file for file in self._files_of_ranks() if file == path or _is_left_over(file, held)]
                if any(file.stat().st_size for file in left):
                    self._merge(left)
                for file in left:
                    if file != path:
                        file.unlink(missing_ok=True)
            self._file.truncate(0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def read(self) -> dict[str, Record]:
        """Record by id, whichever rank or run has written it."""
        # Lines move from the ranks' files to the common one: in this order none is missed.
        of_ranks = [record for path in self._files_of_ranks() for record in _records(path)]
        return {record["id"]: record for record in (*_records(self.folder / RESULTS), *of_ranks)}

    def finish(self, order: Sequence[str], failed: Mapping[str, str], num_done: int) -> dict[str, Any] | None:
        """Move this rank's lines into the common file, sorted by `order`; lines of other ids keep their place behind.

        Returns:
            For the last rank to get here, what all have done: ``num_done`` and ``failed`` (message by id); None else.
        """
        assert self._file is not None
        with _locked(self.folder) as state:
            mine = [self.folder / f"results.{self.rank}.jsonl"]
            with contextlib.ExitStack() as held:
                mine += [path for path in self._files_of_ranks() if path != mine[0] and _is_left_over(path, held)]
                self._merge(mine, order)
                for path in mine:
                    path.unlink(missing_ok=True)
            if state.get("run") != self.run:  # another run has begun meanwhile
                return {"num_done": num_done, "failed": dict(failed)}
            state["finished"][str(self.rank)] = {"failed": dict(failed), "num_done": num_done}
            finished = state["finished"]
            if len(finished) < self.world_size:
                return None
            state["finished"] = {}
        return {
            "num_done": sum(rank["num_done"] for rank in finished.values()),
            "failed": {name: text for rank in finished.values() for name, text in rank["failed"].items()},
        }

    def _merge(self, files: Sequence[Path], order: Sequence[str] = ()) -> None:
        records = {record["id"]: record for path in (self.folder / RESULTS, *files) for record in _records(path)}
        places = {name: place for place, name in enumerate(order)}
        ids = sorted(records, key=lambda name: places.get(name, len(places)))  # stable
        target = self.folder / RESULTS
        text = "".join(json.dumps(records[name], ensure_ascii=False) + "\n" for name in ids)
        partial = partial_name(target)
        partial.write_text(text, encoding="utf-8", errors=_ESCAPED)
        os.replace(partial, target)

    def _files_of_ranks(self) -> list[Path]:
        """In the order in which they were last written."""
        found = [path for path in self.folder.glob("results.*.jsonl") if _OF_RANK.fullmatch(path.name)]
        return sorted(found, key=_time_of)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file, without those that a killed run has left unfinished."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["id"], str):
                raise TypeError("id is not a text")
        except (ValueError, KeyError, TypeError):
            logger.info("%s, line %d is not whole: its request is run again", path, number)
            continue
        yield record


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # a rank has just moved its lines
        return 0


def _is_left_over(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether a rank's file belongs to no running process."""
    try:
        file = held.enter_context(open(path, "a"))  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a rank, or a file system without locks, where nobody can tell
        return False
    return True


def _lock(file: IO[str]) -> bool:
    """False if another process has locked the file; file systems without locks do without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("%s cannot be locked: %s", file.name, error)
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[dict[str, Any]]:
    """The state that ranks share, a JSON object, for one process at a time; what is changed in it is kept."""
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            state = json.loads(file.read() or "{}")
        except ValueError:  # of a process killed while it wrote
            state = {}
        state.setdefault("finished", {})
        yield state
        file.truncate(0)
        file.write(json.dumps(state))
        file.flush()
