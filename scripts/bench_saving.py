"""python scripts/bench_saving.py --gigabytes 0.25

How long training stands still for a checkpoint: written at once, and written in the background. A BAGEL of the given
size (float32 weights; the state on disk is four times that) takes steps; both ways alternate, medians are printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.25, help="of the float32 weights")
    parser.add_argument("--saves", type=int, default=5, help="of each kind that are counted, after one that is not")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: the temporary one")
    options = parser.parse_args()

    import torch
    from bench_loading import config_of

    from echo4o.checkpoint.writer import CheckpointWriter, Progress
    from echo4o.model import Bagel
    from echo4o.train.ema import EMA
    from echo4o.train.engine import SingleProcessEngine
    from echo4o.train.optim import build_optimizer, freeze

    torch.manual_seed(0)
    model = Bagel(config_of(options.gigabytes, 4))
    freeze(model)
    engine = SingleProcessEngine("cpu")
    engine.prepare(model, lambda module: build_optimizer(module, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8))
    ema = EMA(engine.trained(), 0.99)

    def step() -> float:
        started = time.perf_counter()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)
        engine.step()
        ema.update()
        engine.zero_grad()
        return time.perf_counter() - started

    step()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writers = {
            name: CheckpointWriter(
                Path(folder) / name, engine, ema, lambda folder: None, keep_last_n=1, asynchronous=aside
            )
            for name, aside in (("at once", False), ("in the background", True))
        }
        stalls: dict[str, list[float]] = {name: [] for name in writers}
        totals: dict[str, list[float]] = {name: [] for name in writers}
        for number in range(options.saves + 1):
            for name, writer in writers.items():
                writer.save(Progress(number + 1, {}, {}))
                steps = 0
                while (saved := writer.poll()) is None:
                    step()  # training goes on
                    steps += 1
                if saved.error is not None:
                    raise saved.error
                label = "first" if number == 0 else f"no. {number}"
                print(f"{name:<18} {label:<7} stalled {saved.stalled:.2f} s of {saved.seconds:.2f} s, steps: {steps}")
                if number:
                    stalls[name].append(saved.stalled)
                    totals[name].append(saved.seconds)
        state = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / len(writers)
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    at_once, aside = (statistics.median(stalls[name]) for name in writers)
    print(
        f"state on disk {state / 1e9:.2f} GB; training stands still for {at_once:.2f} s when it is written at once, "
        f"{aside:.2f} s when it is written in the background: {aside / at_once:.1%}"
    )


if __name__ == "__main__":
    main()
