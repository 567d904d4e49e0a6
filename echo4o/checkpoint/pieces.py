"""A process' share of a tensor, as a run of its elements: the one form in which sharded tensors are read and written.

FSDP2 shards a tensor by rows, DeepSpeed by flat ranges; both are runs of elements in row-major order, and so are the
bytes of a tensor in a safetensors file. Every process therefore reads and writes its own bytes of an ordinary file, and
nothing is ever gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + len(values))`` of a tensor of `shape`, in row-major order.

    Attributes:
        shape: of the whole tensor.
        start: first element.
        values: (n,) contiguous view of the live storage, so that writing into it loads the tensor; n may be 0.
        owned: this process writes the run (of several that hold the same one, exactly one does).
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor
    owned: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)


def whole(tensor: Tensor, owned: bool = True) -> Piece:
    """A tensor that this process holds completely."""
    return Piece(tuple(tensor.shape), 0, flat(tensor), owned)


def piece_of(tensor: Tensor, rank: int = 0) -> Piece:
    """The piece behind a plain tensor (whole, owned by rank 0) or a DTensor sharded along its first dimension."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.detach(), owned=rank == 0)
    local = tensor.to_local().detach()
    shape = tuple(tensor.shape)
    start, owned = 0, True
    for dim, placement in enumerate(tensor.placements):
        coordinate = tensor.device_mesh.get_local_rank(dim)
        if isinstance(placement, Shard):
            assert placement.dim == 0, "only rows are sharded here"
            rows = -(-shape[0] // tensor.device_mesh.size(dim))  # ceil, as torch.chunk
            start = min(coordinate * rows, shape[0]) * math.prod(shape[1:])
        else:
            assert isinstance(placement, Replicate)
            owned = owned and coordinate == 0
    return Piece(shape, start, flat(local), owned)


def flat(tensor: Tensor) -> Tensor:
    """(n,) view of the tensor's storage.

    Raises:
        ValueError: if the tensor is not contiguous, so that there is no such view.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return torch.as_strided(tensor, (tensor.numel(),), (1,))
