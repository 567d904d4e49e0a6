"""A rank whose steps are one small all-reduce, to be harmed: ``python -m tests.train.watched_run settings.json``.

The same parts, in the same order, as a training; without a model, because each test starts two processes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch

from echo4o.config import ConfigError
from echo4o.train.failures import reporting_failures
from echo4o.train.liveness import Liveness
from echo4o.train.logs import set_up_logs
from echo4o.train.processes import Processes
from echo4o.train.stopping import StopRequest, remove_stop_marker, write_stop_marker


def sleep_in_python() -> None:
    while True:
        time.sleep(0.05)


def sleep_in_native_code() -> None:
    """With Python's lock held: no other thread of this process runs."""
    ctypes.PyDLL(None).sleep(600)


def harm(action: str, out: Path, processes: Processes) -> None:
    if action == "raise":
        raise ValueError("the picture is upside down")
    if action == "data_error":
        raise type("DataError", (ValueError,), {})("row 7 is unusable.\n  Remove it.")
    if action == "config_error":
        raise ConfigError("lr is -1, must be positive")
    if action == "late":
        time.sleep(1)
    if action == "hang":
        sleep_in_python()
    if action == "hang_natively":
        sleep_in_native_code()
    if action == "wait":
        # To be harmed from outside.
        (out / f"ready_{processes.rank}").write_text(str(os.getpid()))
        time.sleep(600)


def run(settings: dict, out: Path, processes: Processes, liveness: Liveness, stop: StopRequest) -> None:
    first = 1
    marker = out / "step"
    if settings.get("resume") and marker.exists():
        first = int(marker.read_text()) + 1
    if processes.rank == 0:
        remove_stop_marker(out)
    for step in range(first, settings["steps"] + 1):
        liveness.progress(step, "data")
        once = out / f"harmed_{processes.rank}"
        action = settings.get("actions", {}).get(f"{processes.rank}@{step}")
        if action and not (settings.get("resume") and once.exists()):
            once.touch()
            harm(action, out, processes)
        liveness.progress(step, "forward")
        processes.all_reduce_sum(torch.ones(4))
        time.sleep(settings.get("step_seconds", 0.05))
        if processes.rank == 0:
            marker.write_text(str(step))
        if any(processes.gather(stop.reason is not None)):
            liveness.progress(step, "save")
            time.sleep(settings.get("save_seconds", 0))
            if processes.rank == 0:
                write_stop_marker(out, stop.reason or "another rank", step, out / "step")
            return
    # One write: ranks may share a pipe.
    os.write(1, f"rank {processes.rank} done at {settings['steps']}\n".encode())


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    torch.set_num_threads(1)
    processes = Processes.from_environment(settings.get("dist_timeout", 60))
    with reporting_failures(processes), set_up_logs(out, processes.rank, processes.world_size) as log:
        if settings.get("early") and str(processes.rank) in settings["early"]:
            harm(settings["early"][str(processes.rank)], out, processes)
        processes.start(torch.device("cpu"))
        liveness = Liveness(
            processes,
            out,
            log,
            hang_timeout=settings.get("hang_timeout", 60),
            dead_rank_timeout=settings.get("dead_rank_timeout", 30),
        )
        if settings.get("apart"):
            # As if every rank had a machine of its own.
            liveness.identity = dataclasses.replace(liveness.identity, host=f"host{processes.rank}", place="")
        # The stop request outermost: torchrun signals all ranks once one has died, and the message comes first.
        stop = StopRequest(settings.get("stop_grace", 60), liveness.end)
        with stop, liveness, reporting_failures(processes, liveness):
            run(settings, out, processes, liveness, stop)
        processes.close()


if __name__ == "__main__":
    main()
