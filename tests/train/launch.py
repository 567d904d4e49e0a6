"""Several processes of a run on this machine, over gloo: ``launch(2, "tests.train.launch:trainings", …)``."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


def start(num_ranks: int, module: str, *arguments: str, **popen: Any) -> list[subprocess.Popen]:
    """``python -m module arguments`` on each rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment(rank, num_ranks, port),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **popen,
        )
        for rank in range(num_ranks)
    ]


def finish(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """What each printed; whoever is not through by then is killed."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not through after {timeout} s: {(error.output or b'')[-2000:]}") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return outputs


def launch(num_ranks: int, function: str, argument: Any = None, timeout: float = 240) -> list[Any]:
    """Call ``module:name`` with `argument` (JSON) on each rank; what they return (JSON), by rank."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "argument.json"
        path.write_text(json.dumps(argument))
        processes = start(num_ranks, "tests.train.launch", function, str(path))
        outputs = finish(processes, timeout)
        codes = [process.returncode for process in processes]
        assert not any(codes), "\n".join(f"rank {r}: {codes[r]}\n{text[-3000:]}" for r, text in enumerate(outputs))
        return [json.loads((Path(folder) / f"result_{rank}.json").read_text()) for rank in range(num_ranks)]


def train_on(num_ranks: int, *list_of_settings: dict, timeout: float = 240) -> None:
    """Whole runs, one after the other in the same processes."""
    runs = [(free_port(), settings) for settings in list_of_settings]
    launch(num_ranks, "tests.train.launch:trainings", runs, timeout)


def trainings(runs: list[tuple[int, dict]]) -> None:
    from echo4o.config import load_config
    from echo4o.train.trainer import train

    for port, settings in runs:
        os.environ["MASTER_PORT"] = str(port)  # a late rank must not meet the run before
        train(load_config((), settings))


def main() -> None:
    import torch

    torch.set_num_threads(1)
    function, path = sys.argv[1:]
    module, _, name = function.partition(":")
    argument = json.loads(Path(path).read_text())
    result = getattr(importlib.import_module(module), name)(argument)
    (Path(path).parent / f"result_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
