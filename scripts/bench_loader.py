"""Measure the data loader at upstream's documented limits: `python scripts/bench_loader.py --json loader.json`

Rebuilds the measurement that upstream BAGEL was put through: multi_ref parquet with 2-4 references of 640×480 to
1024×1024 JPEG photographs (the pictures of scikit-image and scikit-learn, cropped and resized, with sensor noise), one
process, the edit transforms (VAE 1024/512/16, ViT 518/224/14). Each measurement is a process of its own; runs of the
settings alternate and medians are reported. The clock runs from the first row read to the last pack;
on a busy machine samples per second of processor time say more.

    python scripts/bench_loader.py --workers 2                 # with worker processes
    python scripts/bench_loader.py --dropout                   # with upstream's condition dropout (.1, .3, .3)
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from echo4o.data.composition import best_fit
from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.mixture import Mixture
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sources.base import Limits, SourceContext, SourceGroup
from echo4o.data.sources.build import build_sources
from echo4o.data.tokenizer import SpecialTokens

#: expected, max and per-sample tokens; upstream's samples/s with dense masks and with flex, and its fill.
SETTINGS = {
    "fine-tuning": ((10240, 11520, 10240), (1.30, 1.71), 0.678),
    "default": ((32768, 36864, 16384), (1.05, 1.44), 0.859),
}
MARKERS = SpecialTokens(bos_token_id=4096, eos_token_id=4097, start_of_image=4098, end_of_image=4099)
LOOKAHEAD = 50


class WordTokenizer:
    """A word is a token: texts are a thousandth of a multi-reference sample."""

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % 4096 for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))

    def __len__(self) -> int:
        return 4100


def photographs() -> list[np.ndarray]:
    import skimage.data
    import sklearn.datasets

    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    return [*pictures, *sklearn.datasets.load_sample_images().images]


def jpeg(picture: np.ndarray, width: int, height: int, rng: np.random.Generator) -> bytes:
    """A random crop of the right shape at the right size, with the noise that makes JPEG files as big as a camera's."""
    image = Image.fromarray(picture)
    scale = rng.uniform(0.6, 1.0) * min(image.width / width, image.height / height)
    left = rng.uniform(0, image.width - width * scale)
    top = rng.uniform(0, image.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.float32)
    noisy = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, num_rows: int, rows_per_group: int = 16) -> None:
    rng, pictures = np.random.default_rng(0), photographs()
    image_lists, instructions = [], []
    for _ in range(num_rows):
        num_images = int(rng.integers(2, 5)) + 1
        sizes = rng.integers((640, 480), (1025, 1025), (num_images, 2))
        image_lists.append(
            [jpeg(pictures[rng.integers(len(pictures))], int(width), int(height), rng) for width, height in sizes]
        )
        instructions.append([[" ".join(f"word{n}" for n in rng.integers(0, 900, 40))]])
    table = pa.table(
        {
            "image_list": pa.array(image_lists, pa.list_(pa.binary())),
            "instruction_list": pa.array(instructions, pa.list_(pa.list_(pa.string()))),
        }
    )
    pq.write_table(table, folder / "rows.parquet", row_group_size=rows_per_group)


def build_groups(folder: Path) -> list[SourceGroup]:
    limits = Limits(max_latent_size=64, vit_max_num_patch_per_side=70)
    context = SourceContext(WordTokenizer(), MARKERS, data_seed=42, base_dir=folder, limits=limits)
    group = {
        "dataset_names": ["bench"],
        "image_transform_args": {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512},
        "vit_image_transform_args": {"image_stride": 14, "max_image_size": 518, "min_image_size": 224},
        "weight": 1.0,
    }
    info = {"multi_ref": {"bench": {"data_dir": str(folder)}}}
    return build_sources({"multi_ref": group, "dataset_info": info}, context)


def measure(args: argparse.Namespace) -> dict:
    """One run of one setting, in this process."""
    torch.set_num_threads(1)
    (expected, cap, per_sample), _, _ = SETTINGS[args.setting]
    config = LoaderConfig(
        expected_num_tokens=expected,
        max_num_tokens=cap,
        max_num_tokens_per_sample=per_sample,
        max_buffer_size=LOOKAHEAD,
        num_workers=args.workers,
    )
    dropout = {"text_cond_dropout_prob": 0.1, "vae_cond_dropout_prob": 0.3, "vit_cond_dropout_prob": 0.3}
    packer = Packer(
        PackingConfig(
            MARKERS.bos_token_id,
            MARKERS.eos_token_id,
            MARKERS.start_of_image,
            MARKERS.end_of_image,
            **(dropout if args.dropout else {}),
        )
    )
    groups = build_groups(args.data)
    with PackedLoader(groups, packer, config) as loader:
        started, cpu_started = time.perf_counter(), time.process_time()
        num_samples = sum(len(next(loader).sample_lens) for _ in range(args.packs))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        counters, timings = loader.counters(), loader.timings()
    known = ("packed", "too_long", "bad_rows", "buffered")
    accounted = {"packed": counters.get("samples", 0), **{name: counters.get(name, 0) for name in known[1:]}}
    fill = counters["tokens"] / counters["batches"] / cap
    resident = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "samples_per_second": num_samples / seconds,
        "samples_per_cpu_second": num_samples / cpu_seconds if not args.workers else 0.0,
        "packs_per_second": args.packs / seconds,
        "fill": fill,
        "fill_bound": None if args.dropout else best_fit_bound(loader, args.packs),
        "rows_read": counters["rows"],
        **accounted,
        "rows_lost": counters["rows"] - sum(accounted.values()),
        "seconds": seconds,
        "stages": timings,
        "peak_rss_mb": resident / 1024,
    }


def best_fit_bound(loader: PackedLoader, num_packs: int) -> float:
    """Fill of best fit over the same rows and lookahead when no row has a right to be packed in its turn."""
    config, layout = loader.config, loader.layout
    mixtures = {
        stream: Mixture(loader.groups, stream, layout.num_streams, config.data_seed, config.max_num_tokens_per_sample)
        for stream in layout.own_streams
    }
    buffers: dict[int, list[int]] = {stream: [] for stream in mixtures}
    total = 0
    for position in range(num_packs):
        mixture, buffer = mixtures[layout.stream_at(position)], buffers[layout.stream_at(position)]
        room = config.max_num_tokens
        while room > config.max_num_tokens - config.expected_num_tokens:
            buffer += [mixture.next_row().plan.num_tokens for _ in range(LOOKAHEAD - len(buffer))]
            chosen = set(best_fit(buffer, room))
            if not chosen:
                break
            room -= sum(buffer[index] for index in chosen)
            buffer[:] = [size for index, size in enumerate(buffer) if index not in chosen]
        total += config.max_num_tokens - room
    return total / num_packs / config.max_num_tokens


def median_of(runs: list[dict]) -> dict:
    summary = {
        name: statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
        if isinstance(value, (int, float))
    }
    stages = {stage: statistics.median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
    busy = sum(stages.values())
    return {**summary, "stage_shares": {stage: seconds / busy for stage, seconds in stages.items()}, "runs": runs}


def run_setting(args: argparse.Namespace, setting: str, data: Path) -> dict:
    """A run in a process of its own, so that peak memory is that run's."""
    command = [sys.executable, __file__, "--setting", setting, "--data", str(data), "--packs", str(args.packs)]
    command += ["--workers", str(args.workers), *(["--dropout"] if args.dropout else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_table(results: dict[str, dict]) -> None:
    print(f"{'':28}" + "".join(f"{setting:>18}" for setting in results))

    def line(label: str, value) -> None:
        print(f"{label:28}" + "".join(f"{value(result, setting):>18}" for setting, result in results.items()))

    line("limits (expected/max)", lambda _, s: "/".join(f"{n:,}" for n in SETTINGS[s][0][:2]))
    line("packed samples/s", lambda r, _: f"{r['samples_per_second']:.2f}")
    line("  upstream dense/flex", lambda _, s: "{:.2f}/{:.2f}".format(*SETTINGS[s][1]))
    line("  ratio", lambda r, s: "/".join(f"{r['samples_per_second'] / n:.1f}x" for n in SETTINGS[s][1]))
    line("packed samples/CPU s", lambda r, _: f"{r['samples_per_cpu_second']:.2f}")
    line("fill", lambda r, _: f"{r['fill']:.3f}")
    line("  best fit, same lookahead", lambda r, _: f"{r['fill_bound']:.3f}" if "fill_bound" in r else "-")
    line("  upstream", lambda _, s: f"{SETTINGS[s][2]:.3f}")
    for name in ("rows_read", "packed", "too_long", "buffered", "bad_rows", "rows_lost"):
        line(name.replace("_", " "), lambda r, _, name=name: f"{r[name]:.0f}")
    for stage in next(iter(results.values()))["stage_shares"]:
        line(f"time: {stage}", lambda r, _, stage=stage: f"{r['stage_shares'][stage]:.1%}")
    line("peak resident MB", lambda r, _: f"{r['peak_rss_mb']:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows of the data set (default 256)")
    parser.add_argument("--packs", type=int, default=30, help="packs a run (default 30)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each setting (default 3)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default 0, as upstream was measured)")
    parser.add_argument("--dropout", action="store_true", help="upstream's default condition dropout")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.setting:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, args.rows)
        print(f"{args.rows} rows, {(data / 'rows.parquet').stat().st_size / 1e6:.0f} MB of JPEG")
        runs: dict[str, list[dict]] = {setting: [] for setting in SETTINGS}
        for _ in range(args.runs):
            for setting in SETTINGS:
                runs[setting].append(run_setting(args, setting, data))
    results = {setting: median_of(measured) for setting, measured in runs.items()}
    print_table(results)
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {name: str(value) for name, value in vars(args).items()}, "results": results})
        )


if __name__ == "__main__":
    main()
