"""``echo4o merge CHECKPOINT --out DIR``: a complete BAGEL folder out of a LoRA checkpoint and its base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from echo4o.checkpoint.adapters import CONFIG_FILE, MergedWeights, assets_of, is_adapter_folder
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.inventory import TRAINING
from echo4o.checkpoint.pieces import flat
from echo4o.checkpoint.shared_file import SharedFile, create_file, plan_file
from echo4o.checkpoint.writer import link_or_copy
from echo4o.model.config import SCALAR_FILES
from echo4o.model.vae import WEIGHTS_FILE

#: Files of a model folder that are text: tokenizers, generation settings.
_TEXTS = (".json", ".txt", ".jinja", ".model")
_NOT_COPIED = (CONFIG_FILE, TRAINING, "llm_config.json", "vit_config.json", *SCALAR_FILES)


def write_merged(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    weights: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write `out` with weights, configs, tokenizer and VAE; it is complete or absent. Memory: the largest tensor.

    Args:
        folder: with adapters.
        weights: ``ema`` or ``model`` (the file is named after them); None takes ``ema`` where there is one.
        dtype: ``bfloat16`` or ``float32``; None keeps each tensor's of the base.

    Returns:
        The weights file.

    Raises:
        CheckpointError: if there are no adapters, their base is not there, or `out` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not is_adapter_folder(folder):
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: there are no adapters in it to merge")
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another --out, or remove it")
    merged = MergedWeights(folder, weights, base)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        file = partial / f"{merged.kind}.safetensors"
        _write_weights(merged, file, dtype)
        merged.config.save_pretrained(partial)
        _copy_assets(assets_of(folder, base), partial)
        os.rename(partial, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Make room there, or choose another --out.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / file.name


def _write_weights(merged: MergedWeights, path: Path, dtype: str | None) -> None:
    present = [name for name in merged.shapes if name not in merged.absent]
    dtypes = {name: getattr(torch, dtype) if dtype else merged.dtype(name) for name in present}
    layout = plan_file({name: (dtypes[name], merged.shapes[name]) for name in present})
    create_file(path, layout)
    console = Console(stderr=True)
    with SharedFile(path, layout) as file:
        for name in track(present, description=f"merging into {layout.num_bytes / 1e9:.1f} GB", console=console):
            file.write(name, 0, flat(merged.tensor(name, dtypes[name])))


def _copy_assets(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        is_text = path.suffix in _TEXTS and path.is_file()
        if is_text and path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if (source / WEIGHTS_FILE).is_file():
        link_or_copy(source / WEIGHTS_FILE, target / WEIGHTS_FILE)
