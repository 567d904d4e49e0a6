"""FSDP2: parameters, gradients and optimiser sharded by rows over a mesh of ranks.

=================== ========================== ============================ =====================================
sharding_strategy   mesh                       after a block's forward pass what a rank holds
=================== ========================== ============================ =====================================
FULL_SHARD          all ranks shard            resharded                    1/world of everything
SHARD_GRAD_OP       all ranks shard            kept until its backward pass 1/world, and all weights in a step
HYBRID_SHARD        num_replicate × num_shard  resharded                    1/num_shard of everything
_HYBRID_SHARD_ZERO2 num_replicate × num_shard  kept until its backward pass 1/num_shard, and all weights in a step
NO_SHARD            world × 1                  kept                         everything; gradients are summed (DDP)
=================== ========================== ============================ =====================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from echo4o.train.engine.single import SingleProcessEngine, retie
from echo4o.train.parallelize import shard
from echo4o.train.processes import Processes

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "NO_SHARD")


class FSDPEngine(SingleProcessEngine):
    """See `echo4o.train.engine.protocol.Engine`.

    Args:
        processes: one or more (one is of use with `cpu_offload`).
        strategy: one of `STRATEGIES`.
        num_replicate, num_shard: of the hybrid strategies; their product need not be the world size (`mesh_shape`).
            None: upstream's 1 and 8.
        reduce_dtype: in which gradients are summed over ranks.
        backward_prefetch: ``NO_PREFETCH`` gathers a block's weights only when its backward pass begins.
        cpu_offload: weights, gradients and optimiser in host memory, a block at a time on the device.
    """

    def __init__(
        self,
        processes: Processes,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        strategy: str = "FULL_SHARD",
        num_replicate: int | None = None,
        num_shard: int | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        backward_prefetch: str = "BACKWARD_PRE",
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(device, compute_dtype, processes)
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown sharding_strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
        self.strategy = strategy
        self.reduce_dtype = reduce_dtype
        self.prefetch = backward_prefetch != "NO_PREFETCH"
        self.cpu_offload = cpu_offload
        self.notes: list[str] = []
        if backward_prefetch == "BACKWARD_POST":
            self.notes.append("backward_prefetch BACKWARD_POST: FSDP2 prefetches before a block's gradients only")
        self.num_replicate, self.num_shard = self._mesh_shape(num_replicate, num_shard)

    def _mesh_shape(self, num_replicate: int | None, num_shard: int | None) -> tuple[int, int]:
        world = self.world_size
        if self.strategy == "NO_SHARD":
            return world, 1
        if "HYBRID" not in self.strategy:
            return 1, world
        asked = (num_replicate or 1, num_shard or 8)
        shape = mesh_shape(world, *asked)
        if shape != asked and world > 1 and (num_replicate or num_shard):
            self.notes.append(
                f"num_replicate {asked[0]} × num_shard {asked[1]} is not {world} ranks: {shape[0]} × {shape[1]} is used"
            )
        return shape

    @property
    def resharded(self) -> bool:
        """Blocks give their weights back after their forward pass."""
        return self.strategy in ("FULL_SHARD", "HYBRID_SHARD")

    def describe(self) -> str:
        copies = f", {self.num_replicate} replicas" if self.num_replicate > 1 else ""
        offload = ", weights in host memory" if self.cpu_offload else ""
        return f"FSDP2 {self.strategy.lstrip('_')}: each rank holds 1/{self.num_shard}{copies}{offload}"

    def sharding(self) -> tuple[int, str]:
        return self.num_shard, "blocks" if self.resharded else "all"

    def mesh(self) -> DeviceMesh:
        if self.num_replicate == 1:
            return init_device_mesh(self.device.type, (self.num_shard,), mesh_dim_names=("shard",))
        shape = (self.num_replicate, self.num_shard)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def _place(self, model: nn.Module, on_meta: bool) -> None:
        self.processes.start(self.device, even_alone=True)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        home = torch.device("cpu") if self.cpu_offload else self.device
        if not on_meta:
            model.to(home)
        shard(
            model,  # type: ignore[arg-type]
            self.mesh(),
            MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=self.reduce_dtype),
            reshard_after_forward=self.resharded,
            offload_policy=offload,
            prefetch=self.prefetch,
        )
        if on_meta:
            model.to_empty(device=home)
            retie(model)
        if self.cpu_offload:
            # Buffers are no parameters: FSDP2 leaves them where they are.
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(self.device)

    def no_sync(self, enabled: bool) -> AbstractContextManager:
        return self._without_exchange() if enabled else contextlib.nullcontext()

    @contextlib.contextmanager
    def _without_exchange(self) -> Iterator[None]:
        """Between replicas gradients are exchanged once a step. Within a replica they are scattered after every
        micro-batch all the same: kept whole, they would take as much memory as an unsharded model."""
        assert isinstance(self.module, FSDPModule)
        if self.num_shard == 1:
            self.module.set_requires_gradient_sync(False)
        elif self.num_replicate > 1:
            self.module.set_requires_all_reduce(False)
        try:
            yield
        finally:
            if self.num_shard == 1:
                self.module.set_requires_gradient_sync(True)
            elif self.num_replicate > 1:
                self.module.set_requires_all_reduce(True)

    def refresh_weights(self) -> None:
        """After a forward pass without a backward one, what is not resharded still holds gathered weights."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor | None) -> None:
        assert loss is not None and loss.requires_grad, "every rank takes part in every exchange of gradients"
        # FSDP2 averages over ranks; the trainer's losses are shares of a sum.
        (loss * self.world_size).backward()


def mesh_shape(world_size: int, num_replicate: int, num_shard: int) -> tuple[int, int]:
    """Replicas × shards that make `world_size`, as near as possible to what was asked for.

    Upstream's defaults (1 × 8) fit eight ranks only; with fewer, or after an elastic restart, the largest divisor of
    the world that is at most `num_shard` shards.
    """
    if num_replicate * num_shard == world_size:
        return num_replicate, num_shard
    shards = next(n for n in range(min(num_shard, world_size), 0, -1) if world_size % n == 0)
    return world_size // shards, shards
