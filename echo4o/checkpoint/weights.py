"""Write weights files under upstream's names; read the parts that a new model is assembled from.

Reading a whole BAGEL folder is `echo4o.model.Bagel.from_pretrained`; this file adds what a training run needs besides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from echo4o.model import Bagel
from echo4o.model.pretrained import find_weights, iter_tensors, read_shapes


def write_weights(
    tensors: Mapping[str, Tensor], folder: str | Path, name: str = "model", max_shard_bytes: int | None = None
) -> list[Path]:
    """Write ``{name}.safetensors``, or shards with an index where the tensors exceed `max_shard_bytes`.

    Tied tensors are written under each of their names. Files appear under their final names only when complete.

    Returns:
        The files written, the index last.

    Raises:
        OSError: if the disk is full or not writable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        return [_write_file(shards[0], folder / f"{name}.safetensors")]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(_write_file(shard, file))
        weight_map |= dict.fromkeys(shard, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = folder / f"{name}.safetensors.index.json"
    write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return [*files, index]


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either absent or whole, and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a NaN or an infinity."""
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not filled:
        return []
    # The maximum norm of a tensor keeps its NaNs and cannot overflow.
    norms = torch._foreach_norm(list(filled.values()), float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    finite = torch.isfinite(torch.stack([norm.float() for norm in norms])).tolist()
    return [name for name, good in zip(filled, finite, strict=True) if not good]


def load_llm_part(model: Bagel, folder: str | Path) -> list[str]:
    """Read a Hugging Face Qwen2 folder into ``language_model``; returns the model's tensors that it lacks.

    The generation experts (``*_moe_gen``) and the query/key norms that plain Qwen2 does not have stay as they are; copy
    the experts afterwards with ``init_moe``.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if tensors are missing that every Qwen2 has, or have another shape.
    """
    names = {name: f"language_model.{name}" for name in model.language_model.state_dict()}
    if model.config.llm.tie_word_embeddings:
        names.pop("lm_head.weight")
    missing = _copy_part(model, _part_weights(folder, "llm_path"), names)
    if "lm_head.weight" in missing:
        # Small Qwen2 models tie their head to the embeddings and leave it out of the file.
        with torch.no_grad():
            model.language_model.lm_head.weight.copy_(model.language_model.model.embed_tokens.weight)
        missing.remove("lm_head.weight")
    return _refuse_missing(missing, folder, "Qwen2", allowed=("moe_gen", "q_norm", "k_norm"))


def load_vit_part(model: Bagel, folder: str | Path) -> list[str]:
    """Read a Hugging Face SigLIP folder into ``vit_model``; its convolution becomes the linear patch embedding.

    Layers beyond those the model builds (``vit_select_layer``), the pooling head and a text tower are left out.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if tensors are missing or have another shape.
    """
    path = _part_weights(folder, "vit_path")
    # transformers 5 writes SigLIP's vision tower without the prefix of earlier versions.
    prefix = "" if any(name.startswith("vision_model.") for name in read_shapes(path)) else "vision_model."
    names = {name.removeprefix(prefix): f"vit_model.{name}" for name in model.vit_model.state_dict()}
    missing = _copy_part(model, path, names)
    return _refuse_missing(missing, folder, "SigLIP", allowed=("rope.",))


def patch_convolution_to_linear(weight: Tensor) -> Tensor:
    """(hidden, C, p, p) → (hidden, p · p · C), for patches flattened as (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _part_weights(folder: str | Path, flag: str) -> Path:
    path = find_weights(folder, "model")
    if path is None:
        raise FileNotFoundError(
            f"{flag} is {folder}, which holds no model.safetensors (nor model.safetensors.index.json)"
        )
    return path


@torch.no_grad()
def _copy_part(model: Bagel, path: Path, names: Mapping[str, str]) -> list[str]:
    targets = dict(model.state_dict(keep_vars=True))
    left = dict(names)
    for name, tensor in iter_tensors(path, list(names)):
        if name.endswith("patch_embedding.weight") and tensor.ndim == 4:
            tensor = patch_convolution_to_linear(tensor)
        target = targets[left.pop(name)]
        if target.shape != tensor.shape:
            raise ValueError(
                f"{path} holds {name} as {tuple(tensor.shape)}, its config.json asks for {tuple(target.shape)}; "
                "use the config that belongs to these weights"
            )
        target.copy_(tensor)
    return list(left)


def _refuse_missing(missing: list[str], folder: str | Path, kind: str, allowed: tuple[str, ...]) -> list[str]:
    fatal = [name for name in missing if not any(part in name for part in allowed)]
    if fatal:
        raise ValueError(
            f"{folder} lacks {len(fatal)} tensors of a {kind} model, e.g. {', '.join(fatal[:3])}; is it one?"
        )
    return missing


def _split(tensors: Mapping[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes and shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_file(tensors: Mapping[str, Tensor], path: Path) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(_unshared(tensors)), partial, metadata={"format": "pt"})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    return path


def _unshared(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """safetensors refuses tensors that share memory: a tied one is copied."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        shared = place in seen or tensor.nbytes != tensor.untyped_storage().nbytes()
        seen.add(place)
        yield name, tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
