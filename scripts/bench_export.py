"""python scripts/bench_export.py --gigabytes 4

Memory and time of `echo4o export`: a synthetic checkpoint of the given size is exported (and verified) in a process of
its own, whose peaks are sampled: RssAnon, and Pss_File of mapped files. ``write`` does not read back. ``plain`` is the
plain way: all tensors into memory, converted, saved with safetensors, nothing checked. Runs alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_loading import GB, ROOT, PeakMemory, write_model

EXAMPLE = ROOT / "data_examples" / "tiny_bagel"


def write_checkpoint(folder: Path, gigabytes: float, dtype: str) -> int:
    """A complete BAGEL folder: synthetic weights, the example's VAE and tokenizer; returns the bytes of its weights."""
    num_bytes = write_model(folder, gigabytes, dtype)
    for name in ("ae.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config["vae_config"] = json.loads((EXAMPLE / "config.json").read_text())["vae_config"]
    (folder / "config.json").write_text(json.dumps(config))
    write_tables(folder, dtype)
    return num_bytes


def write_tables(folder: Path, dtype: str) -> None:
    """The position tables are no noise."""
    import torch

    from echo4o.checkpoint.pieces import flat
    from echo4o.checkpoint.shared_file import SharedFile, plan_file
    from echo4o.model import Bagel, BagelConfig
    from echo4o.model.embeddings import sincos_2d

    with torch.device("meta"):
        model = Bagel(BagelConfig.from_pretrained(folder))
    number = getattr(torch, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = plan_file({name: (number, shape) for name, shape in shapes.items()})
    with SharedFile(folder / "ema.safetensors", layout) as file:
        for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
            num_entries, width = shapes[name]
            file.write(name, 0, flat(sincos_2d(width, math.isqrt(num_entries)).to(number).contiguous()))


def child(how: str, folder: Path, out: Path) -> None:
    """What each process does; prints a JSON line."""
    import torch

    from echo4o.checkpoint.hf.command import ExportRequest, run_export
    from echo4o.checkpoint.hf.export import write_export
    from echo4o.checkpoint.hf.sources import Source

    torch.set_num_threads(1)
    with PeakMemory() as peak:
        time.sleep(0.1)
        before, started = peak.anonymous, time.perf_counter()
        if how == "export":
            run_export(ExportRequest(folder, out, layout="bagel", forward=False), say=lambda text: None)
        elif how == "write":
            write_export(Source(folder), out)
        else:
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / "ema.safetensors")
            out.mkdir()
            save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, out / "ema.safetensors")
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before": before, "anonymous": peak.anonymous, "mapped": peak.mapped}))


def measure(how: str, folder: Path, out: Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--child", how, "--folder", str(folder), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=1800, check=True)
    shutil.rmtree(out, ignore_errors=True)
    return json.loads(result.stdout.splitlines()[-1])


def largest_tensor(folder: Path) -> int:
    from echo4o.checkpoint.slices import WeightsReader

    reader = WeightsReader(folder / "ema.safetensors")
    return max(math.prod(shape) * reader.dtypes[name].itemsize for name, shape in reader.shapes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint's weights")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"), help="of the checkpoint")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="also measure the plain way (needs the memory)")
    parser.add_argument("--folder", type=Path, help="where the synthetic checkpoint lies; default: a temporary folder")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("export", "write", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "checkpoint"
        num_bytes = write_checkpoint(folder, options.gigabytes, options.dtype)
        largest = largest_tensor(folder)
        print(f"checkpoint {num_bytes / GB:.2f} GB, {options.dtype}; largest tensor {largest / GB:.3f} GB")
        ways = ["export", "write", *(["plain"] if options.plain else [])]
        found: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(options.runs):
            for way in ways:
                found[way].append(measure(way, folder, Path(temporary) / "out"))
        for way, results in found.items():
            seconds = statistics.median(one["seconds"] for one in results)
            peak = max(one["anonymous"] for one in results)
            extra = max(one["anonymous"] - one["before"] for one in results)
            mapped = max(one["mapped"] for one in results)
            print(
                f"{way:>7}: {seconds:6.1f} s ({num_bytes / GB / seconds:.2f} GB/s)   anonymous memory "
                f"{peak / GB:.3f} GB, {extra / GB:.3f} GB of it after the imports ({extra / largest:.2f} of the "
                f"largest tensor)   mapped files {mapped / GB:.3f} GB"
            )


if __name__ == "__main__":
    main()
