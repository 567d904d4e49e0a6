"""``echo4o diff A B``: which tensors of two models differ, and by how much. Did anything train?

Both are read a chunk at a time: folders, checkpoints (whole, with frozen parts, with adapters) or single files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from echo4o.checkpoint.adapters import MergedWeights, is_adapter_folder
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.changes import Difference, TensorDifference, larger_or_nan
from echo4o.checkpoint.hf.difference_report import difference_json, difference_text
from echo4o.checkpoint.hf.progress import byte_progress
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.model.pretrained import VAE_PREFIXES, find_weights, shard_files
from echo4o.model.vae import WEIGHTS_FILE

__all__ = ["Difference", "diff", "difference_json", "difference_text"]

#: Compared at once: fits a processor's cache.
_CHUNK_ELEMENTS = 1 << 19
_LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
_TABLES = ("latent_pos_embed.", "vit_pos_embed.", "vit_model.vision_model.rope.")
#: Fixed tables of two programs, in two precisions, agree up to this.
_TABLE_TOLERANCE = 2.0**-7


def diff(
    a: str | Path,
    b: str | Path,
    *,
    weights_a: str | None = None,
    weights_b: str | None = None,
    base: str | Path | None = None,
) -> Difference:
    """Compare two models. Memory: a chunk of each; with adapters, the largest tensor that has one.

    Args:
        a, b: folder, checkpoint, or file.
        weights_a, weights_b: ``ema`` or ``model``; None takes ``ema`` where there is one.
        base: of adapters: where their base is now, if not where their config says.

    Raises:
        CheckpointError: if there are no such weights, or they are damaged.
    """
    one, other = _Weights(Path(a), weights_a, base), _Weights(Path(b), weights_b, base)
    shared, only_a, only_b, shapes = [], [], [], {}
    for name, shape in one.shapes.items():
        found = other.shape_of(name)
        if found is None:
            only_a.append(name)
        elif found != shape:
            shapes[name] = (shape, found)
        else:
            shared.append(name)
    only_b = [name for name in other.shapes if one.shape_of(name) is None]
    total = sum(math.prod(one.shapes[name]) * one.dtype(name).itemsize for name in shared)
    with byte_progress("comparing", total) as advance:
        tensors = []
        for name in shared:
            tensors.append(_compare(name, one, other))
            advance(math.prod(one.shapes[name]) * one.dtype(name).itemsize)
    return Difference(one.label, other.label, tuple(tensors), _without_tables(only_a), _without_tables(only_b), shapes)


def _without_tables(names: list[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith(_TABLES))


# ---------------------------------------------------------------- reading


class _Weights:
    """The tensors of a folder or a file, adapters merged in, by runs of elements."""

    def __init__(self, path: Path, weights: str | None, base: str | Path | None) -> None:
        self._merged: MergedWeights | None = None
        self._kept: tuple[str, Tensor] | None = None
        if path.is_dir() and is_adapter_folder(path):
            self._merged = MergedWeights(path, weights, base)
            self._layers = self._merged.layers
            self.shapes = {n: s for n, s in self._merged.shapes.items() if n not in self._merged.absent}
            self.label = f"{path} ({self._merged.kind}, adapters merged)"
            return
        found = find_weights(path, weights) if path.is_dir() else path
        if found is None or not found.is_file():
            wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
            what = f"has no {wanted}, nor an index of shards" if path.is_dir() else "is neither a folder nor a file"
            raise CheckpointError(f"{path} {what}; pass a folder with weights, or name the other kind")
        try:
            readers = [WeightsReader(file) for file in shard_files(found) if file.name != WEIGHTS_FILE]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{error} (echo4o verify {path} says more)") from error
        self._layers = LayeredReader(readers)
        self.shapes = {n: s for n, s in self._layers.shapes().items() if not n.startswith(VAE_PREFIXES)}
        kind = found.name.partition(".")[0]
        self.label = f"{path} ({kind})" if path.is_dir() else str(path)

    def _known(self, name: str) -> str | None:
        """Its name here: of tied word embeddings a file may hold but one."""
        tied = {_HEAD: _EMBEDDING, _EMBEDDING: _HEAD}.get(name)
        return next((known for known in (name, tied) if known in self.shapes), None)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        known = self._known(name)
        return None if known is None else self.shapes[known]

    def dtype(self, name: str) -> torch.dtype:
        known = self._known(name)
        assert known is not None
        if self._merged is not None:
            return self._merged.dtype(known)
        reader, held = self._find(known)
        return reader.dtypes[held]

    def runs(self, name: str) -> Iterator[Tensor]:
        """(n,) elements in row-major order, in the file's dtype."""
        known = self._known(name)
        assert known is not None
        total = math.prod(self.shapes[known])
        merged = self._adapted(known)
        for start in range(0, total, _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, total)
            if merged is not None:
                yield merged[start:stop]
            else:
                reader, held = self._find(known)
                yield reader.run(held, start, stop)

    def _find(self, name: str) -> tuple[WeightsReader, str]:
        found = self._layers.find(name)
        assert found is not None
        return found

    def _adapted(self, name: str) -> Tensor | None:
        """(n,) with its adapter's update; None of a tensor that has none and the shape of its file."""
        if self._merged is None:
            return None
        reader, held = self._find(name)
        plain = f"{name.removesuffix('.weight')}.lora_A.weight" not in self._merged.adapter.tensors
        if plain and reader.shapes[held] == self.shapes[name]:
            return None
        return self._merged.tensor(name, self._merged.dtype(name)).flatten()


# ---------------------------------------------------------------- comparing


def _compare(name: str, one: _Weights, other: _Weights) -> TensorDifference:
    dtype_a, dtype_b = one.dtype(name), other.dtype(name)
    num_elements = math.prod(one.shapes[name])
    squares, squares_a, largest, different = 0.0, 0.0, 0.0, 0
    # Which rounding of which side gives the other: those that hold for all chunks so far.
    may_be = dtype_a.is_floating_point and (dtype_a != dtype_b or dtype_a.itemsize > 2)
    roundings = {(low, side) for low in _LOW for side in "ab"} if may_be else set()
    exact = torch.float64 if torch.float64 in (dtype_a, dtype_b) else torch.float32
    for run_a, run_b in zip(one.runs(name), other.runs(name), strict=True):
        x = run_a.to(exact)
        squares_a += _sum_of_squares(x)
        is_same = dtype_a == dtype_b and torch.equal(run_a, run_b)
        y = x if is_same else run_b.to(exact)
        roundings = {(low, side) for low, side in roundings if _is_rounded(x, y, _LOW[low], side)}
        if is_same:
            continue
        # Equal infinities and NaNs differ in nothing.
        same = (x == y) | (x.isnan() & y.isnan())
        change = torch.where(same, torch.zeros((), dtype=exact), x - y)
        different += change.numel() - int(same.sum())
        squares += _sum_of_squares(change)
        largest = larger_or_nan(largest, float(change.abs().max()))
    rounded = min(low for low, _ in roundings) if different and roundings else None
    return TensorDifference(
        name=name,
        num_elements=num_elements,
        dtype_a=_name_of(dtype_a),
        dtype_b=_name_of(dtype_b),
        max=largest,
        rms=math.sqrt(squares / max(num_elements, 1)),
        rms_a=math.sqrt(squares_a / max(num_elements, 1)),
        share=different / max(num_elements, 1),
        rounded=rounded,
        is_table=name.startswith(_TABLES) and largest <= _TABLE_TOLERANCE,
    )


def _sum_of_squares(values: Tensor) -> float:
    total = float(torch.dot(values, values))
    return total if math.isfinite(total) else float(values.double().square().sum())


def _is_rounded(x: Tensor, y: Tensor, low: torch.dtype, side: str) -> bool:
    source, target = (x, y) if side == "a" else (y, x)
    return torch.equal(source.to(low).to(source.dtype), target)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
