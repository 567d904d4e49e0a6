"""What the trainer needs from whatever runs the model: one process here, sharded engines behind the same methods.

The trainer never asks which engine it has. Tensors of `state`, `empty_state` and the EMA may be sharded (DTensor);
`consolidate` is the only place where they become whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Engine(Protocol):
    """One run's model, gradients and optimiser on this process.

    Attributes:
        device: where batches go.
        rank / world_size: this process among all.
        compute_dtype: dtype of matrix products; the master weights stay float32.
        module: the prepared model; its parameter names are the model's own.
        optimizer: has ``param_groups``; the trainer writes the learning rate there.
    """

    device: torch.device
    rank: int
    world_size: int
    compute_dtype: torch.dtype
    module: nn.Module
    optimizer: Any

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
        """Place (shard) the model, then build the optimiser over what is then its parameters."""
        ...

    def autocast(self) -> AbstractContextManager:
        """Context of every forward pass."""
        ...

    def no_sync(self, enabled: bool) -> AbstractContextManager:
        """While enabled, `backward` accumulates without exchanging gradients (all but a step's last micro-batch)."""
        ...

    def backward(self, loss: Tensor | None) -> None:
        """Add the gradient of `loss`, this rank's share of the global loss; gradients are *summed* over ranks.

        None means that nothing in this rank's micro-batch is learned; sharded engines still take part.
        """
        ...

    def clip_grad_norm(self, max_norm: float) -> float:
        """Global norm before clipping to `max_norm` (0 or less: measure only). Non-finite gradients are left alone."""
        ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, on every rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank (small picklable objects)."""
        ...

    def barrier(self) -> None: ...

    def state(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}`` of what trains."""
        ...

    def empty_state(self, keys: set[str]) -> dict[str, Any]:
        """As `state`, to be loaded into; optimiser slots only for ``optimizer.{name}.{slot}`` in `keys`."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a filled `empty_state`."""
        ...

    def consolidate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0, an empty dictionary elsewhere."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's complete state dict on rank 0 (frozen parts too), an empty dictionary elsewhere."""
        ...
