"""Starts the ranks of `tests.train.watched_run` as processes, and sees that none is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_settings(out: Path, **settings) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    path.write_text(json.dumps({"out": str(out), "steps": 3} | settings))
    return path


def environment(out: Path, **more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(out), "CUDA_VISIBLE_DEVICES": ""} | more


class Ranks:
    """Use as a context manager.

    Args:
        settings: of `watched_run`.
    """

    def __init__(self, out: Path, world_size: int = 2, **settings) -> None:
        self.out = out
        path, port = write_settings(out, **settings), str(free_port())
        self.processes = []
        for rank in range(world_size):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            variables = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            with (out / f"output_{rank}").open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.train.watched_run", str(path)],
                        cwd=ROOT,
                        env=environment(out, **variables),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def signal(self, rank: int, number: int) -> float:
        """Once that rank waits to be harmed, and the others wait for it; returns when."""
        wait_for(self.out / f"ready_{rank}")
        time.sleep(1.5)  # a beat later
        self.processes[rank].send_signal(number)
        return time.monotonic()

    def status(self, rank: int, timeout: float = 40) -> int:
        return self.processes[rank].wait(timeout)

    def output(self, rank: int | None = None) -> str:
        """What a rank printed, or all of them."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join((self.out / f"output_{rank}").read_text() for rank in ranks)

    def log(self, rank: int) -> str:
        return (self.out / "logs" / f"rank_{rank:05d}.log").read_text()


def wait_for(path: Path, timeout: float = 40) -> None:
    end = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)
