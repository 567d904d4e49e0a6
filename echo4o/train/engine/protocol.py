"""What the trainer needs from whatever runs the model: one process, FSDP2, or DeepSpeed, behind the same methods.

The trainer never asks which engine it has. Names of tensors are upstream's, whatever wrappers (LoRA, compilation) sit
between. Sharded tensors appear as `Piece`s: this process' run of their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from echo4o.checkpoint.pieces import Piece
from echo4o.train.processes import Processes

T = TypeVar("T")
Read = Callable[[Mapping[str, Piece]], None]


class Engine(Protocol):
    """One run's model, gradients and optimiser on this process.

    Attributes:
        device: where batches go.
        rank / world_size: this process among all; `processes` says more of them.
        compute_dtype: dtype of matrix products; the master weights of what trains are float32.
        module: the prepared model.
        optimizer: has ``param_groups``; the trainer writes the learning rate there.
    """

    device: torch.device
    processes: Processes
    rank: int
    world_size: int
    compute_dtype: torch.dtype
    module: nn.Module
    optimizer: Any

    def prepare(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        read: Read | None = None,
    ) -> nn.Module:
        """Place (shard) the model, fill it, and build the optimiser over what is then its parameters.

        Args:
            model: on the meta device where `read` is given; with its values otherwise (the same on every rank).
            read: fills the pieces it is given, by name, from the weights file; called once or several times.
        """
        ...

    def describe(self) -> str:
        """The strategy in words, for the banner."""
        ...

    def sharding(self) -> tuple[int, str]:
        """Ranks that share one copy of the model, and which weights are gathered (`echo4o.train.memory.GATHERED`)."""
        ...

    def autocast(self) -> AbstractContextManager:
        """Context of every forward pass."""
        ...

    def no_sync(self, enabled: bool) -> AbstractContextManager:
        """While enabled, `backward` may leave out exchanges that the step's last micro-batch makes up for."""
        ...

    def backward(self, loss: Tensor | None) -> None:
        """Add the gradient of `loss`, this rank's share of the global loss; gradients are *summed* over ranks.

        Every rank calls it equally often: sharded engines exchange gradients in it.
        """
        ...

    def clip_grad_norm(self, max_norm: float) -> float:
        """Global norm before clipping to `max_norm` (0 or less: measure only). Non-finite gradients are left alone."""
        ...

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    # ------------------------------------------------------------ between processes (CPU tensors and small objects)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, on every rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank (small picklable objects)."""
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank (small picklable objects)."""
        ...

    def barrier(self) -> None: ...

    # ------------------------------------------------------------ tensors by name

    def trained(self) -> dict[str, Piece]:
        """float32 masters of what trains; views, so that filling them loads them (then call `refresh`)."""
        ...

    def frozen(self) -> dict[str, Piece]:
        """Everything else of the model's state dict, in its own dtype; views."""
        ...

    def optimizer_slots(self, create: Collection[str] = ()) -> dict[str, Piece]:
        """``{name}.{slot}`` of what the optimiser keeps an element of a parameter (``exp_avg``, ``exp_avg_sq``); views.

        Args:
            create: keys to be there afterwards, even if the optimiser has not taken a step yet.
        """
        ...

    def optimizer_steps(self) -> dict[str, int]:
        """Updates that the optimiser has made of each parameter."""
        ...

    def set_optimizer_steps(self, steps: Mapping[str, int]) -> None: ...

    def refresh(self) -> None:
        """After pieces were filled: make every derived copy (bf16 weights of ZeRO, …) agree with them."""
        ...

    def refresh_weights(self) -> None:
        """The same where only pieces of `trained` were filled: what the optimiser keeps is not looked at."""
        ...

    # ------------------------------------------------------------ whole tensors

    def consolidate(self, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Whole CPU tensors on rank 0, an empty dictionary elsewhere. Collective; for small models and tests."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's complete state dict on rank 0 (frozen parts too), an empty dictionary elsewhere."""
        ...
