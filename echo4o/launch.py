"""What processes of one start know of each other before they have met. Imports nothing that takes time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def start_time(pid: int) -> str:
    """When a process of this machine was started, in the kernel's ticks; empty where the system does not tell."""
    try:
        return process_state(pid)[1]
    except OSError:
        return ""


def name_of_start() -> str:
    """The same for all ranks that one launcher starts on this host, for use before they have met."""
    parent = os.getppid()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"echo4o-{os.environ.get('MASTER_PORT', '0')}-{parent}-{start_time(parent)}-{restart}"


def first_on_this_host(key: str) -> bool:
    """Whether no other process of this host has asked so far: for messages that ranks cannot agree about otherwise."""
    try:
        (Path(tempfile.gettempdir()) / f"{key}.claimed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def process_state(pid: int) -> tuple[str, str]:
    """(state, start time) of a process of this machine.

    Raises:
        OSError: if there is none, or the system does not tell.
    """
    # Its name, which may hold anything, stands in brackets before them.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
