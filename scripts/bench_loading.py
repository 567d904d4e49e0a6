"""python scripts/bench_loading.py --gigabytes 1 --ranks 1 2 4

Memory and time of loading a BAGEL checkpoint into sharded float32 weights and their average: a synthetic model of the
given size is written to --folder (reused if it is there), and 1, 2 and 4 processes on this machine load it with FSDP2.
Peaks are the operating system's own (RssAnon, Pss_File), sampled while the processes load; ``--upstream`` adds one
process that does it upstream's way (random weights, whole state dict, deep copy for the average).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASELINE_MB = 250  # what a process may need beside its shards
GB = 1e9


def config_of(gigabytes: float, dtype_bytes: int):
    """A BAGEL with 7B's proportions: layers of 7B's shape at a quarter of the width, as many as the size asks for."""
    from echo4o.model import BagelConfig, LLMConfig, ViTConfig

    hidden, intermediate, vocab = 896, 4864, 32_000
    layer = 2 * (3 * hidden * intermediate + 2 * hidden * hidden + 2 * hidden * 128)
    embeddings = 2 * vocab * hidden
    layers = max(1, round((gigabytes * GB / dtype_bytes - embeddings) / layer))
    return BagelConfig(
        llm=LLMConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=vocab,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            layer_module="Qwen2MoTDecoderLayer",
            qk_norm=True,
            tie_word_embeddings=False,
        ),
        vit=ViTConfig(288, 1076, 7, 4, image_size=980, patch_size=14),
        vae=None,
        max_latent_size=64,
    )


def write_model(folder: Path, gigabytes: float, dtype_name: str) -> int:
    """Write the synthetic checkpoint unless it is there; returns its bytes."""
    import torch

    from echo4o.checkpoint.shared_file import SharedFile, create_file, plan_file
    from echo4o.model import Bagel

    dtype = getattr(torch, dtype_name)
    config = config_of(gigabytes, dtype.itemsize)
    with torch.device("meta"):
        model = Bagel(config)
    shapes = {name: (dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    layout = plan_file(shapes)
    path = folder / "ema.safetensors"
    if not path.exists() or path.stat().st_size != layout.num_bytes:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        create_file(path, layout)
        noise = torch.randn(1 << 22).mul_(0.02).to(dtype)
        with SharedFile(path, layout) as file:
            for name, (_, shape) in shapes.items():
                left, start = torch.Size(shape).numel(), 0
                while left:
                    part = noise[: min(left, len(noise))]
                    file.write(name, start, part)
                    start, left = start + len(part), left - len(part)
    return layout.num_bytes


class PeakMemory:
    """Largest RssAnon and Pss_File of this process, sampled in a thread."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(0.01):
            self.anonymous = max(self.anonymous, _kilobytes("/proc/self/status", "RssAnon") * 1024)
            if count % 20 == 0:
                self.mapped = max(self.mapped, _kilobytes("/proc/self/smaps_rollup", "Pss_File") * 1024)
            count += 1
        self.mapped = max(self.mapped, _kilobytes("/proc/self/smaps_rollup", "Pss_File") * 1024)


def _kilobytes(file: str, entry: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1])
    return 0


def load_one_rank(folder: Path, upstream: bool) -> None:
    """What each process does; prints a JSON line."""
    import torch

    from echo4o.model import Bagel, BagelConfig

    torch.set_num_threads(1)
    config = BagelConfig.from_pretrained(folder)
    with PeakMemory() as peak:
        started = time.perf_counter()
        if upstream:
            from safetensors.torch import load_file

            model = Bagel(config)
            model.load_state_dict(load_file(folder / "ema.safetensors"))
            average = copy.deepcopy(model)
            result = sum(t.nbytes for m in (model, average) for t in m.state_dict().values())
        else:
            result = _load_sharded(folder, config)
        seconds = time.perf_counter() - started
    print(
        json.dumps({"anonymous": peak.anonymous, "mapped": peak.mapped, "seconds": seconds, "result": result}),
        flush=True,
    )


def _load_sharded(folder: Path, config) -> int:
    import torch

    from echo4o.checkpoint.slices import LayeredReader, WeightsReader
    from echo4o.model import Bagel
    from echo4o.train.ema import EMA
    from echo4o.train.engine.fsdp import FSDPEngine
    from echo4o.train.optim import freeze
    from echo4o.train.processes import Processes
    from echo4o.train.reading import reading

    processes = Processes.from_environment()
    with torch.device("meta"):
        model = Bagel(config)
    freeze(model)
    engine = FSDPEngine(processes, torch.device("cpu"), torch.float32, strategy="FULL_SHARD")
    read = reading(model, LayeredReader([WeightsReader(folder / "ema.safetensors")]), "ema.safetensors", show=False)
    engine.prepare(model, lambda module: torch.optim.SGD(module.parameters(), lr=1.0), read)
    average = EMA(engine.trained(), 0.99)
    pieces = [*engine.trained().values(), *engine.frozen().values(), *average.pieces().values()]
    result = sum(piece.values.nbytes for piece in pieces)
    processes.barrier()
    processes.close()
    return result


def measure(folder: Path, ranks: int, upstream: bool = False) -> list[dict]:
    """Start the processes and collect what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--rank-of", str(folder), *(["--upstream"] if upstream else [])]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def report(ranks: int, found: list[dict], checkpoint: int) -> bool:
    """Print a line; False if a bound is exceeded."""
    result = sum(one["result"] for one in found)
    anonymous = sum(one["anonymous"] for one in found)
    node = anonymous + sum(one["mapped"] for one in found)
    bound = 1.2 * result + ranks * BASELINE_MB * 1e6
    node_bound = 1.2 * checkpoint + result
    print(
        f"{ranks} ranks: {max(one['seconds'] for one in found):6.1f} s   shards {result / GB:.2f} GB   "
        f"anonymous {anonymous / GB:.2f} GB (bound {bound / GB:.2f})   "
        f"with mapped files {node / GB:.2f} GB (bound {node_bound / GB:.2f})   "
        f"largest process {max(one['anonymous'] for one in found) / GB:.2f} GB",
        flush=True,
    )
    return anonymous <= bound and node <= node_bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where the synthetic model lies; default: a temporary folder")
    parser.add_argument("--upstream", action="store_true", help="also measure upstream's way with one process")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        load_one_rank(options.rank_of, options.upstream)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        checkpoint = write_model(folder, options.gigabytes, options.dtype)
        print(f"checkpoint {checkpoint / GB:.2f} GB, {options.dtype}; float32 weights and average are sharded")
        good = all([report(ranks, measure(folder, ranks), checkpoint) for ranks in options.ranks])
        if options.upstream:
            one = measure(folder, 1, upstream=True)[0]
            needed = one["anonymous"] + one["mapped"]
            print(
                f"upstream's way: {one['seconds']:.1f} s, {needed / GB:.2f} GB on every rank "
                f"= {needed / checkpoint:.2f} × the checkpoint"
            )
    sys.exit(not good)


if __name__ == "__main__":
    main()
