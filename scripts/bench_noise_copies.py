"""What `noise_copies` buys: held-out loss at equal compute, for a target laid down 1, 2 and 4 times.

    python scripts/bench_noise_copies.py --model runs/tiny_bagel --steps 300 --copies 1 2 4

Each run trains the tiny model on the example task with as many tokens a step and as many steps, so with (nearly) the
same compute: k copies spend it on k targets a sample and fewer samples a step. The loss on held-out rows is then taken
with the same noise and time steps for all. Prints a table; `--json` keeps it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from echo4o.config import RunConfig, load_config, plan_loading
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder
from echo4o.train.data import build_groups, build_loader, build_tokenizer
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.latents import encode_batch

EXAMPLES = Path(__file__).resolve().parents[1] / "data_examples"
#: Targets a held-out row: more noise and time steps a row make the figure steadier.
HELDOUT_COPIES = 8


def with_copies(dataset: Path, copies: int, folder: Path) -> Path:
    """A variant of a dataset YAML, with absolute paths, whose multi-reference targets are laid down `copies` times."""
    config = yaml.safe_load(dataset.read_text(encoding="utf-8"))
    for entry in config["dataset_info"]["multi_ref"].values():
        for key in ("data_dir", "jsonl_path", "parquet_info_path"):
            if key in entry:
                entry[key] = str((dataset.parent / entry[key]).resolve())
    config["multi_ref"]["noise_copies"] = copies
    variant = folder / f"{dataset.stem}_{copies}.yaml"
    variant.write_text(yaml.safe_dump(config), encoding="utf-8")
    return variant


def train(model: Path, dataset: Path, folder: Path, args: argparse.Namespace) -> list[Path]:
    """Train with the quickstart's settings; returns the checkpoints in order of steps."""
    flags = {
        "init_from": model, "dataset_config_file": dataset,
        "results_dir": folder, "checkpoint_dir": folder / "checkpoints",
        "total_steps": args.steps, "save_every": args.steps // 3, "keep_last_n": 3, "num_workers": 0, "eval_every": 0,
        "lr": 1.5e-3, "lr_scheduler": "constant", "global_seed": args.seed, "data_seed": args.seed,
    }  # fmt: skip
    command = [sys.executable, "-m", "echo4o.cli", "train", str(EXAMPLES.parent / "configs" / "tiny_cpu.yaml")]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return sorted(path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def heldout_loss(checkpoint: Path, dataset: Path) -> float:
    """Mean squared velocity error per latent token over one pass of the held-out rows, averaged weights."""
    config: RunConfig = load_config(
        [str(EXAMPLES.parent / "configs" / "tiny_cpu.yaml"), "--init_from", str(checkpoint)]
        + ["--dataset_config_file", str(dataset), "--num_workers", "0"]
        + [f"--{name}_dropout_prob=0.0" for name in ("text_cond", "vae_cond", "vit_cond", "all_refs")]
    )
    model = Bagel.from_pretrained(checkpoint, weights="ema").eval()
    vae = AutoEncoder.from_pretrained(checkpoint)
    tokenizer, special_tokens = build_tokenizer(plan_loading(config, None))
    groups = build_groups(config, model.config, tokenizer, special_tokens)
    loader = build_loader(config, model.config, special_tokens, groups, SingleProcessEngine("cpu", "float32"))
    total = tokens = samples = 0
    with torch.no_grad(), loader:
        while samples < sum(len(group.source) for group in groups):
            batch = next(loader)
            latents, noise = encode_batch(vae, batch, model.config.latent_patch_size)
            mse = model(batch, latents, noise, return_hidden=False).mse
            total, tokens, samples = (
                total + float(mse.mean(-1).sum()),
                tokens + len(mse),
                samples + len(batch.sample_lens),
            )
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="tiny BAGEL folder (scripts/make_tiny_bagel.py)")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        heldout = with_copies(EXAMPLES / "dataset_heldout.yaml", HELDOUT_COPIES, Path(temporary))
        for copies in args.copies:
            folder = Path(temporary) / f"copies_{copies}"
            folder.mkdir()
            dataset = with_copies(EXAMPLES / "dataset.yaml", copies, Path(temporary))
            checkpoints = train(args.model, dataset, folder, args)
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for checkpoint in checkpoints:
                step = int(checkpoint.name)
                rows.append({"copies": copies, "step": step, "heldout_mse": heldout_loss(checkpoint, heldout)})
                print(f"copies {copies}  step {step}  held-out mse {rows[-1]['heldout_mse']:.4f}", flush=True)
            rows[-1]["last_log"] = metrics[-1]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
