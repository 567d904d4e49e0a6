"""Models of the hub for a run: the first process of each host downloads, the others wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echo4o.checkpoint.adapters import is_adapter_folder, read_adapter_config
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hub import cached_folder, local_folder, repository_of, split_name
from echo4o.config import ConfigError
from echo4o.train.processes import Processes

#: Seconds between the processes' looks at each other while a download goes on.
INTERVAL = 1.0


@dataclass
class Fetched:
    """What a download has come to: a folder, or why there is none; neither while it goes on."""

    folder: str = ""
    error: str = ""

    @property
    def is_over(self) -> bool:
        return bool(self.folder or self.error)


def fetch_model(name: str, *, processes: Processes, on_progress: Callable[[], None] = lambda: None) -> str:
    """The folder of a repository's name in the hub's cache, on every host; other names as they are. Called by all ranks
    alike; no exchange between them lasts as long as the download.

    Args:
        on_progress: called about once a second while somebody downloads.

    Raises:
        ConfigError: if the hub does not give it, or gives hosts different commits.
    """
    if any(processes.gather(Path(name).is_dir())) or not _is_repository(name):
        return name
    result = Fetched()
    if processes.local_rank == 0:
        result = _fetch(name) if processes.world_size == 1 else _fetch_beside(name)
    while not all(found.is_over or not first for first, found in _of_all(processes, result)):
        on_progress()
        time.sleep(INTERVAL)
    firsts = [found for first, found in _of_all(processes, result) if first]
    if errors := sorted({found.error for found in firsts if found.error}):
        raise ConfigError(errors[0])
    commits = {repository_of(found.folder) for found in firsts}
    if len(commits) > 1:
        raise ConfigError(
            f"{name} changed while hosts downloaded it ({', '.join(sorted(str(c and c[1]) for c in commits))}): start "
            "again, or name the commit, owner/name@commit"
        )
    found = commits.pop()
    if result.folder or found is None:
        return result.folder or firsts[0].folder
    try:
        return str(cached_folder(*found))
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; all processes of a host need the same HF_HOME") from error


def fetch_base(checkpoint: str, stated: str | None, fetch: Callable[[str], str]) -> None:
    """Download the base of a LoRA checkpoint that is resumed, if it is a repository's and not here.

    Args:
        stated: what the settings name beside it; with one, the checkpoint's own base may be out of reach.

    Raises:
        ConfigError: as `fetch_model`.
    """
    if not is_adapter_folder(checkpoint):
        return
    try:
        fetch(read_adapter_config(checkpoint).base)
    except (CheckpointError, ConfigError) as error:
        if not stated:
            raise ConfigError(str(error)) from error
        fetch(stated)


def folder_here(name: str) -> str:
    """The cache's folder of a repository's name; other names, and what is not in the cache, as they are."""
    if Path(name).is_dir() or not _is_repository(name):
        return name
    try:
        return str(cached_folder(*split_name(name)))
    except FileNotFoundError:
        return name


def _is_repository(name: str) -> bool:
    try:
        split_name(name)
    except FileNotFoundError:
        return False
    return True


def _of_all(processes: Processes, result: Fetched) -> list[tuple[bool, Fetched]]:
    """(whether it is the first of its host, its result) of every rank."""
    return processes.gather((processes.local_rank == 0, Fetched(result.folder, result.error)))


def _fetch(name: str) -> Fetched:
    try:
        return Fetched(folder=str(local_folder(name)))
    except OSError as error:
        return Fetched(error=str(error))


def _fetch_beside(name: str) -> Fetched:
    """Filled by a thread when the download is over."""
    result = Fetched()

    def work() -> None:
        try:
            found = _fetch(name)
        except Exception as error:  # else the others would wait for ever
            found = Fetched(error=f"{name}: {type(error).__name__}: {error}")
        result.folder, result.error = found.folder, found.error

    threading.Thread(target=work, name="fetching", daemon=True).start()
    return result
