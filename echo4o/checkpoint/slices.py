"""Runs of elements out of safetensors files: every process reads only its own bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from echo4o.checkpoint.pieces import Piece
from echo4o.model.pretrained import TensorFile, shard_files, upstream_name

#: Rows of a table averaged at once.
_CHUNK_ROWS = 4096
#: Elements read at once.
_CHUNK_ELEMENTS = 1 << 24


class WeightsReader:
    """Tensors of one safetensors file, or of an index's shards, by upstream's names; only headers are read at first.

    Args:
        path: ``….safetensors`` or ``….safetensors.index.json``.
        prefix: of the names in the file, left out here.

    Raises:
        FileNotFoundError: if shards are missing.
        ValueError: if a file is not a complete safetensors file.
        OSError: if one cannot be read.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path = Path(path)
        self._files: dict[str, TensorFile] = {}
        self._held: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in shard_files(self.path):
            opened = TensorFile(file)
            for held, stored in opened.tensors.items():
                name = upstream_name(held.removeprefix(prefix))
                self._files[name], self._held[name] = opened, held
                self.shapes[name], self.dtypes[name] = stored.shape, opened.dtype(held)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def run(self, name: str, start: int, stop: int) -> Tensor:
        """(stop − start,) elements of a tensor in row-major order, in the file's dtype."""
        return self._files[name].run(self._held[name], start, stop)

    @torch.no_grad()
    def fill(self, name: str, piece: Piece) -> int:
        """Load a piece; returns the bytes read. The file's tensor may have fewer rows than the piece's (a vocabulary
        that has grown): those beyond it become the mean of the others.

        Raises:
            ValueError: if the shapes do not agree otherwise.
        """
        shape = self.shapes[name]
        if shape[1:] != piece.shape[1:] or len(shape) != len(piece.shape) or (shape and shape[0] > piece.shape[0]):
            raise ValueError(f"{self.path} holds {name} as {shape}, the model as {piece.shape}")
        held = math.prod(shape)
        end = min(piece.stop, held)
        for first in range(piece.start, end, _CHUNK_ELEMENTS):
            last = min(first + _CHUNK_ELEMENTS, end)
            run = self.run(name, first, last)
            piece.values[first - piece.start : last - piece.start].copy_(run)
        if piece.stop > held and piece.values.numel():
            self._fill_grown(name, piece, held)
        return max(0, end - piece.start) * self.dtypes[name].itemsize

    def _fill_grown(self, name: str, piece: Piece, held: int) -> None:
        rows, width = self.shapes[name]
        mean = torch.zeros(width, dtype=torch.float64)
        for first in range(0, rows, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, rows)
            run = self.run(name, first * width, last * width)
            mean += run.reshape(-1, width).double().sum(0)
        first = max(piece.start, held)
        positions = torch.arange(first, piece.stop) % width
        piece.values[first - piece.start :].copy_((mean / rows)[positions])


class LayeredReader:
    """Several readers as one: of each name the first that has it counts (an adapter over its base, say)."""

    def __init__(self, readers: Iterable[WeightsReader], aliases: Mapping[str, str] | None = None) -> None:
        self.readers = list(readers)
        self.aliases = dict(aliases or {})

    def find(self, name: str) -> tuple[WeightsReader, str] | None:
        """The reader that has it, and its name there (tied tensors may be stored under the other name)."""
        for known in (name, self.aliases.get(name)):
            for reader in self.readers:
                if known is not None and known in reader:
                    return reader, known
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for reader in reversed(self.readers) for name, shape in reader.shapes.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: dtype for reader in reversed(self.readers) for name, dtype in reader.dtypes.items()}
