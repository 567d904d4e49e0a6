"""One safetensors file from chunks of tensors: checked for finite numbers and hashed on the way to the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.provenance import Provenance
from echo4o.checkpoint.shared_file import FileLayout, SharedFile, create_file

#: Called with the number of bytes that have been written.
Advance = Callable[[int], Any]
#: Called with a folder under its temporary name, complete but for the card; what it raises undoes everything.
Finish = Callable[[Path, Provenance], None]
_BLOCK_BYTES = 1 << 24


def write_tensors(
    path: Path, layout: FileLayout, tensors: Iterable[tuple[str, Iterator[Tensor]]], advance: Advance
) -> str:
    """Write a safetensors file from chunks of its tensors, in the order of the layout.

    Returns:
        The file's SHA-256.

    Raises:
        CheckpointError: naming a tensor that is not finite.
        OSError: if the disk is full.
    """
    create_file(path, layout)
    digest = hashlib.sha256(layout.header)
    with SharedFile(path, layout) as file:
        for name, chunks in tensors:
            start = 0
            for chunk in chunks:
                _require_finite(name, chunk)
                file.write(name, start, chunk)
                start += chunk.numel()
                digest.update(memoryview(chunk.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
                advance(chunk.nbytes)
    return digest.hexdigest()


def _require_finite(name: str, chunk: Tensor) -> None:
    good = torch.isfinite(chunk)
    if not bool(good.all()):
        nans = int(torch.isnan(chunk).sum())
        what = f"{nans:,} NaN" if nans else f"{int((~good).sum()):,} infinite numbers"
        remedy = "with --dtype bfloat16, whose range is float32's" if chunk.dtype == torch.float16 and not nans else ""
        raise CheckpointError(f"{name} has {what}: export {remedy or 'an earlier checkpoint'}")


def file_digests(folder: Path, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name → size and SHA-256 of every file; those of large ones are known already."""
    return {
        path.name: {"size": path.stat().st_size, "sha256": known.get(path.name) or sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
