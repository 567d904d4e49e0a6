"""python scripts/prove_learning.py

Trains the tiny model on the example task until it composes, and measures whether it really uses its references and its
text, on held-out rows that it has never seen:

reference-swap ratio   error of pictures drawn from their own references / from those of another row, same text
text-swap ratio        error of pictures drawn from their own text / from one that means something else, same references

The error is the mean absolute difference to the row's target, in 0 … 255; a model that ignores its references (or its
text) has a ratio of 1. Copying has no ratio to be proud of either: the error must also be below that of the reference
which resembles the target most. About 45 minutes on a CPU core. A run that was stopped goes on where it was.

    python scripts/prove_learning.py --measure FOLDER        # measure a model or a checkpoint, without training
    python scripts/prove_learning.py --keep data_examples/tiny_bagel   # also keep the model, in bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from example_scenes import DATA_SEED, Composition
from german_instructions import SETTINGS, german
from make_example_data import (
    Counts,
    encode,
    heldout_rows,
    multi_ref_rows,
    write_edit,
    write_json,
    write_parquet,
    write_t2i,
    write_vlm,
)
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from echo4o.checkpoint.adapters import assets_of, load_bagel
from echo4o.generate.pipeline import Echo4oPipeline

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "tiny_learning.yaml"
TRAIN_ROWS = 6000
SETTINGS = {**SETTINGS, "preset": "multi_ref"}
LIMIT = 0.6
ROLES = {
    "shape": r"shape of image (\d)",
    "texture": r"texture of image (\d)",
    "background": r"background of image (\d)|image (\d) as the background",
    "colour": r"colour of image (\d)",
    "name": r"(?:Make|Paint|on a) .*?((?:light )?\w+)(?: background)?\.$",
}


# ---------------------------------------------------------------- data and training


def train_rows() -> list[Composition]:
    return multi_ref_rows("train", TRAIN_ROWS, DATA_SEED, frozenset(heldout_rows()))


def unseen_rows() -> list[Composition]:
    """The held-out rows, without those that training has in another wording."""
    seen = {(row.references, row.target) for row in train_rows()}
    return [row for row in heldout_rows() if (row.references, row.target) not in seen]


def write_data(folder: Path) -> None:
    """6,000 multi-reference rows, none of them held out, and 600 rows of each other kind."""
    rows = train_rows()
    columns = {
        "image_list": [[encode(image) for image in row.images()] for row in rows],
        "instruction_list": [[[row.instruction]] for row in rows],
    }
    info = write_parquet(folder / "multi_ref" / "part-00000.parquet", columns)
    write_json(folder / "multi_ref" / "parquet_info.json", {"multi_ref/part-00000.parquet": info})
    counts = Counts(t2i=600, edit=600, vlm=600)
    for write, name in ((write_t2i, "t2i"), (write_edit, "edit"), (write_vlm, "vlm")):
        write(folder / name, counts, DATA_SEED + 1)
    groups = yaml.safe_load((ROOT / "data_examples" / "dataset_mixed.yaml").read_text(encoding="utf-8"))
    groups["dataset_info"]["multi_ref"]["example_multi_ref"] = {
        "data_dir": "multi_ref",
        "parquet_info_path": "multi_ref/parquet_info.json",
    }
    groups["multi_ref"] |= {"weight": 10, "noise_copies": 4, "num_used_data": [1]}
    groups["unified_edit"]["weight"] = 1.5
    groups["vlm_sft"] |= {"weight": 1.5, "is_mandatory": False, "num_used_data": [counts.vlm]}
    (folder / "dataset.yaml").write_text(yaml.safe_dump(groups, sort_keys=False), encoding="utf-8")


def run(*arguments: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # so small a model is no faster with two threads
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, env=environment)


def train(folder: Path, flags: Sequence[str]) -> Path:
    """Make what is missing, train, and return the last checkpoint."""
    if not (folder / "data" / "dataset.yaml").is_file():
        print(f"== {TRAIN_ROWS} rows in {folder / 'data'}", flush=True)
        write_data(folder / "data")
    if not (folder / "tiny_bagel" / "ema.safetensors").is_file():
        run("scripts/make_tiny_bagel.py", "--out", str(folder / "tiny_bagel"))
    places = {
        "--dataset_config_file": folder / "data" / "dataset.yaml",
        "--init_from": folder / "tiny_bagel",
        "--results_dir": folder / "train",
        "--checkpoint_dir": folder / "train" / "checkpoints",
    }
    arguments = [str(word) for pair in places.items() for word in pair]
    run("-m", "echo4o.cli", "train", str(CONFIG), *arguments, "--auto_resume", "True", *flags)
    return (folder / "train" / "checkpoints" / "latest").resolve()


# ---------------------------------------------------------------- measuring


def meaning(instruction: str) -> dict[str, str]:
    """What an instruction asks for, whatever its wording: the image (or colour) of each role."""
    found = {role: re.search(pattern, instruction) for role, pattern in ROLES.items()}
    return {role: next(group for group in match.groups() if group) for role, match in found.items() if match}


def partner(rows: Sequence[Composition], number: int, differs: Callable[[Composition, Composition], bool]) -> int:
    """The next row (cyclically) with as many references that differs."""
    own = rows[number]
    for step in range(1, len(rows)):
        place = (number + step) % len(rows)
        if len(rows[place].references) == len(own.references) and differs(own, rows[place]):
            return place
    raise ValueError(f"row {number} has no partner to swap with")


def draw(pipe: Echo4oPipeline, jobs: Sequence[tuple[Composition, str, Composition]]) -> list[np.ndarray]:
    """Pictures of (references of a row, text, row whose size they take), eight at a time."""
    pictures = []
    for start in range(0, len(jobs), 8):
        requests = []
        for number, (references, text, target) in enumerate(jobs[start : start + 8], start=start):
            images = [Image.fromarray(pixels) for pixels in references.images()[:-1]]
            width, height = target.target[1]
            size = {"height": height, "width": width}
            requests.append(pipe.prompt_request(text, images, seed=number, **size, **SETTINGS))
        pictures += [np.asarray(image) for image in pipe.batch(requests).images]
        print(f"  {len(pictures)}/{len(jobs)} pictures", flush=True)
    return pictures


def errors(pictures: Sequence[np.ndarray], rows: Sequence[Composition]) -> np.ndarray:
    """(rows,) mean absolute difference to the targets, 0 … 255."""
    pairs = zip(pictures, rows, strict=True)
    return np.array([np.abs(p.astype(float) - row.images()[-1].astype(float)).mean() for p, row in pairs])


def best_copies(rows: Sequence[Composition]) -> np.ndarray:
    """(rows,) error of the reference, brought to the target's size, that resembles the target most."""
    best = []
    for row in rows:
        *references, target = row.images()
        size = (target.shape[1], target.shape[0])
        copies = [np.asarray(Image.fromarray(pixels).resize(size)) for pixels in references]
        best.append(min(errors(copies, [row] * len(copies))))
    return np.array(best)


def measure(model: Path, out: Path, weights: str | None = None, language: str = "en") -> dict:
    """Draw the unseen rows three times, write a contact sheet and ``swap_ratios.json``, and return the numbers."""
    torch.manual_seed(0)
    pipe = Echo4oPipeline.from_pretrained(model, dtype="float32", device="cpu", weights=weights)
    rows = unseen_rows()
    other = [rows[partner(rows, i, lambda a, b: a.references != b.references)] for i in range(len(rows))]
    unlike = [
        rows[partner(rows, i, lambda a, b: meaning(a.instruction) != meaning(b.instruction))] for i in range(len(rows))
    ]
    if language == "de":
        rows, other, unlike = ([german(row) for row in some] for some in (rows, other, unlike))
    own = draw(pipe, [(row, row.instruction, row) for row in rows])
    swapped = draw(pipe, [(donor, row.instruction, row) for row, donor in zip(rows, other, strict=True)])
    reworded = draw(pipe, [(row, donor.instruction, row) for row, donor in zip(rows, unlike, strict=True)])
    means = {
        name: float(errors(pictures, rows).mean())
        for name, pictures in (("own", own), ("other_references", swapped), ("other_text", reworded))
    }
    means["best_copy"] = float(best_copies(rows).mean())
    result = {
        "rows": len(rows),
        "error": means,
        "reference_swap_ratio": means["own"] / means["other_references"],
        "text_swap_ratio": means["own"] / means["other_text"],
        "settings": SETTINGS,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "swap_ratios.json", result)
    write_sheet(out / "heldout.png", rows, own)
    return result


def write_sheet(path: Path, rows: Sequence[Composition], pictures: Sequence[np.ndarray], zoom: int = 2) -> None:
    """A third of the held-out rows: instruction, references, target, and what the model drew."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].references))[::3]
    jobs = [(rows[i].images(), pictures[i], rows[i].instruction) for i in order]
    step = max(max(image.shape[1] for image in images) for images, _, _ in jobs) * zoom + 16
    heights = [48 + max(image.shape[0] for image in images) * zoom for images, _, _ in jobs]
    page = Image.new("RGB", (16 + 6 * step, sum(heights)), (246, 246, 246))
    pen, top = ImageDraw.Draw(page), 0
    for (images, drawn, text), height in zip(jobs, heights, strict=True):
        pen.text((16, top + 6), text, fill=(0, 0, 0))
        labels = [*(f"image {place}" for place in range(1, len(images))), "target"]
        cells = [*zip(range(len(images) - 1), labels, images, strict=False), (4, "target", images[-1])]
        for column, label, pixels in [*cells, (5, "drawn", drawn)]:
            picture = Image.fromarray(pixels)
            pen.text((16 + column * step, top + 20), label, fill=(110, 110, 110))
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            page.paste(picture, (16 + column * step, top + 34))
        top += height
    page.save(path, optimize=True)


# ---------------------------------------------------------------- keeping


def keep(checkpoint: Path, folder: Path, numbers: dict) -> None:
    """The model as a BAGEL folder of its own, weights in bfloat16; its autoencoder is a link to the examples' one."""
    folder.mkdir(parents=True, exist_ok=True)
    model, assets = load_bagel(checkpoint, dtype=torch.float32), assets_of(checkpoint)
    tables = set(model.table_names())
    state = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items() if n not in tables}
    save_file(state, folder / "ema.safetensors", metadata={"format": "pt"})
    (folder / "ema.safetensors").chmod(0o644)
    for name in ("config.json", "llm_config.json", "vit_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets / name, folder / name)
    vae = ROOT / "data_examples" / "tiny_vae" / "ae.safetensors"
    (folder / "ae.safetensors").unlink(missing_ok=True)
    (folder / "ae.safetensors").symlink_to(os.path.relpath(vae, folder))
    write_json(folder / "learning.json", numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--measure", type=Path, help="measure this model folder or checkpoint instead of training")
    parser.add_argument("--weights", choices=("ema", "model"), help="default: ema where there is one")
    parser.add_argument("--language", choices=("en", "de"), default="en", help="of the held-out instructions")
    parser.add_argument("--keep", type=Path, help="write the model there, in bfloat16")
    arguments, flags = parser.parse_known_args()
    if arguments.measure is not None and flags:
        parser.error(f"unknown {flags[0]}; flags of `echo4o train` are passed on only when training")
    out = arguments.out.resolve()
    checkpoint = arguments.measure or train(out, flags)
    numbers = measure(checkpoint, out, arguments.weights, arguments.language)
    if arguments.keep is not None:
        keep(checkpoint, arguments.keep, numbers)
    print(json.dumps(numbers, indent=2))
    failed = [name for name in ("reference_swap_ratio", "text_swap_ratio") if numbers[name] >= LIMIT]
    for name in failed:
        print(f"{name} is {numbers[name]:.2f}, not below {LIMIT}: the model does not compose yet")
    if numbers["error"]["own"] >= numbers["error"]["best_copy"]:
        failed.append("best_copy")
        print("its pictures are no nearer to the targets than the best reference is: it may be copying")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
