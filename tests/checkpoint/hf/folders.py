"""Folders of every layout, small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo4o.checkpoint.adapters import AdapterConfig, write_adapter_config
from echo4o.checkpoint.folders import publish
from echo4o.checkpoint.names import ADAPTER_PREFIX
from echo4o.checkpoint.weights import write_weights
from tests.train.tiny_run import write_bagel

INDEX = "model.safetensors.index.json"
LAYER = "language_model.model.layers.0.self_attn.q_proj_moe_gen"
RANK = 3


def bagel(folder: Path) -> Path:
    """``ema.safetensors`` in bfloat16 and upstream's files beside it."""
    write_bagel(folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "ema.safetensors")
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    return folder


def hf(folder: Path) -> Path:
    """Shards, an index, and remote code."""
    bagel(folder)
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    write_weights(tensors, folder, "model", max_shard_bytes=50_000)
    add_remote_code(folder)
    return folder


def both(folder: Path) -> Path:
    """One file for upstream, and an index over it for transformers."""
    bagel(folder)
    files = dict.fromkeys(load_file(folder / "ema.safetensors"), "ema.safetensors")
    files |= dict.fromkeys(load_file(folder / "ae.safetensors"), "ae.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    add_remote_code(folder)
    return folder


def upstream_training(folder: Path) -> Path:
    """As upstream's trainer saves, once the configs lie beside: no position tables, optimiser shards."""
    bagel(folder)
    tensors = {n: t for n, t in load_file(folder / "ema.safetensors").items() if "pos_embed.pos_embed" not in n}
    save_file(tensors, folder / "ema.safetensors")
    save_file(tensors, folder / "model.safetensors")
    (folder / "optimizer.00000-of-00001.pt").write_bytes(b"not looked at")
    return folder


def checkpoint(folder: Path) -> Path:
    """A training checkpoint with frozen parts: an index over two files, and a marker."""
    partial = write_bagel(folder.with_name("partial"))
    tensors = load_file(partial / "model.safetensors")
    (partial / "model.safetensors").unlink()
    frozen = {name: tensor for name, tensor in tensors.items() if name.startswith("vit_model.")}
    trained = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    save_file(frozen, partial / "frozen.safetensors")
    for kind in ("model", "ema"):
        save_file(trained, partial / f"{kind}.trained.safetensors")
        files = dict.fromkeys(frozen, "frozen.safetensors") | dict.fromkeys(trained, f"{kind}.trained.safetensors")
        (partial / f"{kind}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (partial / "training.json").write_text("{}")
    publish(partial, folder, 1)
    return folder


def adapter(folder: Path) -> Path:
    """LoRA of one layer, in peft's format; the base lies beside the folder."""
    base = bagel(folder.with_name(f"{folder.name}_base"))
    folder.mkdir()
    write_adapter_config(folder, AdapterConfig(str(base), RANK, 6.0, 0.0, (LAYER,), base_weights="ema"))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{ADAPTER_PREFIX}{LAYER}.lora_A.weight": torch.randn(RANK, 32, generator=generator),
        f"{ADAPTER_PREFIX}{LAYER}.lora_B.weight": torch.randn(32, RANK, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    layout.__name__: layout for layout in (bagel, hf, both, upstream_training, checkpoint, adapter)
}


def add_remote_code(folder: Path) -> None:
    (folder / "modeling_bagel.py").write_text("class BagelForConditionalGeneration:\n    pass\n")
    change_json(folder / "config.json", auto_map={"AutoModel": "modeling_bagel.BagelForConditionalGeneration"})


def change_json(path: Path, **changes: object) -> None:
    """Set entries of a JSON file; None removes them."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` work on the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
