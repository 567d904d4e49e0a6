"""Where DeepSpeed's ZeRO optimisers keep this rank's float32 masters and reduced gradients.

DeepSpeed offers whole tensors of these, or copies; checkpoints and the moving average need views. What is used of its
insides stands in this file alone (as of DeepSpeed 0.19.8), and the engine's tests hold it to its meaning:

=========================== ================================ ======================================== ==============
optimiser                   masters (flat, one a group)      gradients after the last micro-batch     weights anew
=========================== ================================ ======================================== ==============
DeepSpeedZeroOptimizer      single_partition_of_fp32_groups  averaged_gradients; offloaded: .grad of  update_lp_…
(stages 1, 2)                                                the masters
BF16_Optimizer (stage 1     fp32_groups_flat_partition       fp32_groups_gradient_flat_partition      update_lp_…
in bfloat16)
DeepSpeedZeroOptimizer_     fp32_partitioned_groups_flat     as stages 1, 2                           as its step()
Stage3
=========================== ================================ ======================================== ==============
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from echo4o.checkpoint.pieces import Piece

#: Elements whose float64 copy may be alive while norms are taken.
_NORM_CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """A parameter's elements ``[start, start + length)`` are ``[offset, offset + length)`` of a group's flat tensor."""

    group: int
    offset: int
    start: int
    length: int
    shape: tuple[int, ...]

    def piece(self, flat: Tensor) -> Piece:
        return Piece(self.shape, self.start, flat.detach()[self.offset : self.offset + self.length])


class ReplicatedWeights:
    """Stages 1 and 2: every rank holds all weights, and the masters of one flat range of each parameter group."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.masters: list[Tensor] = optimizer.single_partition_of_fp32_groups
        self.places = _places_of_fragments(optimizer.bit16_groups)

    def gradients(self) -> list[Tensor]:
        """Of this rank's masters, summed over ranks; empty before a step's last micro-batch."""
        if self.optimizer.cpu_offload:
            return [master.grad for master in self.masters if master.grad is not None]
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group or ()]

    def forget_gradients(self) -> None:
        """As the optimiser's step() does when it finds an overflow."""
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = -1  # the next micro-batch begins a step
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()

    def refresh(self) -> None:
        """Weights from masters, on all ranks."""
        self.optimizer.update_lp_params()


class ReplicatedGradients:
    """Stage 1 in bfloat16: every rank also holds all gradients, in float32."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.masters: list[Tensor] = optimizer.fp32_groups_flat_partition
        self.places = _places_of_fragments(optimizer.bf16_groups)

    def gradients(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_gradient_flat_partition

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class PartitionedWeights:
    """Stage 3: every parameter is cut into equal flat ranges, the last one padded."""

    def __init__(self, optimizer: Any, rank: int) -> None:
        self.optimizer = optimizer
        self._running = sys.modules[type(optimizer.parameter_offload).__module__].FWD_MODULE_STACK
        self._num_running = len(self._running)
        self.masters: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        self.places: dict[nn.Parameter, Place] = {}
        for group, parameters in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                start, length = partition_range(parameter, rank)
                self.places[parameter] = Place(group, offset, start, length, tuple(parameter.ds_shape))
                offset += parameter.partition_numel()

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [master.grad for master in self.masters if master.grad is not None]
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group or ()]

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # the next micro-batch begins a step
        self.optimizer.averaged_gradients = {}
        # Recomputation stops early, inside of modules, which then stay on DeepSpeed's list of running ones.
        del self._running[self._num_running :]
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()

    def refresh(self) -> None:
        """As the optimiser's step(), without an update: small parameters, which stay gathered, are gathered anew."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


Partitions = ReplicatedWeights | ReplicatedGradients | PartitionedWeights


def partitions_of(optimizer: Any, rank: int) -> Partitions:
    """The partitions behind the optimiser that `deepspeed.initialize` has made."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return PartitionedWeights(optimizer, rank)
    if hasattr(optimizer, "bf16_groups"):
        return ReplicatedGradients(optimizer)
    return ReplicatedWeights(optimizer)


def partition_range(parameter: Any, rank: int) -> tuple[int, int]:
    """First element and number of elements of a stage-3 parameter that a rank holds."""
    start = min(rank * parameter.partition_numel(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def frozen_piece(parameter: Any, rank: int) -> Piece:
    """A stage-3 parameter's partition, in the dtype of the weights."""
    start, length = partition_range(parameter, rank)
    return Piece(tuple(parameter.ds_shape), start, parameter.ds_tensor.detach()[:length])


def local_square(gradients: list[Tensor]) -> Tensor:
    """(1,) float64: the square of the gradients' norm on this rank, on the CPU."""
    if not gradients:
        return torch.zeros(1, dtype=torch.float64)
    parts = (part for gradient in gradients for part in gradient.reshape(-1).split(_NORM_CHUNK))
    norms = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts])
    return norms.square().sum().reshape(1).cpu()


def _places_of_fragments(groups: list[list[Any]]) -> dict[nn.Parameter, Place]:
    places = {}
    for group, parameters in enumerate(groups):
        for parameter in parameters:
            shape, mapping = tuple(parameter.shape), parameter._hp_mapping
            if mapping is None:  # another rank's
                places[parameter] = Place(group, 0, 0, 0, shape)
                continue
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            places[parameter] = Place(group, flat.start, inside.start, inside.numel, shape)
            assert 0 < inside.numel <= math.prod(shape)
    return places
