"""A training in a process of its own, to be killed: ``python -m tests.train.kill_run settings.json``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from echo4o.checkpoint import writer
from echo4o.config import load_config
from echo4o.train import trainer as trainer_module


def signal_group(pid: int, number: int) -> None:
    """As a scheduler does it: from outside, to every process of the run, and then some time passes."""
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgid(pid)}"], check=True, start_new_session=True)
    time.sleep(0.5)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    kill_at, kill_with = settings.pop("kill_at", None), settings.pop("kill_with", "SIGKILL")
    send = signal_group if settings.pop("kill_group", False) else os.kill
    kill_in_save = settings.pop("kill_in_save", None)
    torch.set_num_threads(1)
    if kill_in_save is not None:
        publish = writer.publish

        def die_before_publishing(partial: Path, folder: Path, step: int) -> None:
            if step == kill_in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(partial, folder, step)

        writer.publish = die_before_publishing
    if kill_at is not None:
        count = trainer_module.Trainer.count

        def count_then_die(self, result, micro_batches) -> None:
            count(self, result, micro_batches)
            if self.run.step == kill_at:
                send(os.getpid(), signal.Signals[kill_with])

        trainer_module.Trainer.count = count_then_die
    trainer_module.train(load_config((), settings))


if __name__ == "__main__":
    main()
