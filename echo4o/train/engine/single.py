"""One process: a CPU or one GPU. float32 master weights; matrix products in bfloat16 through autocast where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from echo4o.checkpoint.names import public_name
from echo4o.checkpoint.pieces import Piece, piece_of
from echo4o.train.engine.consolidation import consolidate
from echo4o.train.engine.protocol import Read
from echo4o.train.processes import Processes

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: What AdamW keeps for each element of a parameter.
SLOTS = ("exp_avg", "exp_avg_sq")


class SingleProcessEngine:
    """See `echo4o.train.engine.protocol.Engine`.

    Args:
        device: ``auto`` (this process' GPU if there are any), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of products: ``auto`` (bfloat16 on GPUs, float32 on CPUs), ``float32`` or ``bfloat16``.
        processes: of which there is one.

    Raises:
        ValueError: for a device that is not there or an unknown dtype.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", processes: Processes | None = None
    ) -> None:
        self.processes = processes or Processes()
        self.rank, self.world_size = self.processes.rank, self.processes.world_size
        self.device = resolve_device(str(device), self.processes.local_rank)
        self.compute_dtype = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, self.device)
        self._trained: dict[str, nn.Parameter] = {}
        self._quantised: dict[str, tuple[Tensor, Tensor]] = {}

    def describe(self) -> str:
        return "one process, nothing is sharded"

    def sharding(self) -> tuple[int, str]:
        return 1, "none"

    def prepare(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        read: Read | None = None,
    ) -> nn.Module:
        _require_float32_masters(model)
        self._place(model, on_meta=read is not None)
        self.module = model
        self._trained = {public_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        if read is not None:
            read(self.trained() | self.frozen())
        self.optimizer = build_optimizer(model)
        return model

    def _place(self, model: nn.Module, on_meta: bool) -> None:
        """Put the model on its device: its values, or, from the meta device, room for them."""
        if on_meta:
            model.to_empty(device=self.device)
            retie(model)
        else:
            model.to(self.device)

    def autocast(self) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def no_sync(self, enabled: bool) -> AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor | None) -> None:
        if loss is not None and loss.requires_grad:
            loss.backward()

    def clip_grad_norm(self, max_norm: float) -> float:
        parameters = [p for p in self._trained.values() if p.grad is not None]
        if not parameters:
            return 0.0
        norm = _whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if max_norm > 0 and bool(torch.isfinite(norm)):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------ between processes

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return self.processes.all_reduce_sum(values)

    def gather(self, value: T) -> list[T]:
        return self.processes.gather(value)

    def broadcast(self, value: T) -> T:
        return self.processes.broadcast(value)

    def barrier(self) -> None:
        self.processes.barrier()

    # ------------------------------------------------------------ tensors by name

    def trained(self) -> dict[str, Piece]:
        return {name: piece_of(parameter, self.rank) for name, parameter in self._trained.items()}

    def frozen(self) -> dict[str, Piece]:
        persistent = set(self.module.state_dict(keep_vars=True))
        tensors = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        tensors |= {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        return {public_name(name): piece_of(tensor, self.rank) for name, tensor in tensors.items()}

    def optimizer_slots(self, create: Collection[str] = ()) -> dict[str, Piece]:
        create = set(create)
        pieces = {}
        for name, parameter in self._trained.items():
            if any(f"{name}.{slot}" in create for slot in SLOTS) and not self.optimizer.state.get(parameter):
                self.optimizer.state[parameter] = _fresh_slots(self.optimizer, parameter)
            for slot, tensor in (self.optimizer.state.get(parameter) or {}).items():
                if slot in SLOTS:
                    pieces[f"{name}.{slot}"] = piece_of(self._plain(f"{name}.{slot}", tensor), self.rank)
        return pieces

    def _plain(self, key: str, slot: Tensor) -> Tensor:
        """The slot itself; of an 8-bit one a float32 copy, which `refresh` writes back."""
        if not hasattr(_local(slot), "dequantize") or type(_local(slot)) is Tensor:
            return slot
        copy = _local(slot).dequantize().float().contiguous()
        self._quantised[key] = (slot, copy)
        if not isinstance(slot, DTensor):
            return copy
        return DTensor.from_local(copy, slot.device_mesh, slot.placements, shape=slot.shape, stride=slot.stride())

    def optimizer_steps(self) -> dict[str, int]:
        state = self.optimizer.state
        return {name: int(state[p]["step"]) for name, p in self._trained.items() if state.get(p)}

    def set_optimizer_steps(self, steps: Mapping[str, int]) -> None:
        for name, number in steps.items():
            count = self.optimizer.state[self._trained[name]]["step"]
            if isinstance(count, Tensor):
                count.fill_(float(number))
            else:
                self.optimizer.state[self._trained[name]]["step"] = number

    @torch.no_grad()
    def refresh(self) -> None:
        for slot, copy in self._quantised.values():
            _local(slot).copy_(copy)
        self._quantised.clear()
        self.refresh_weights()

    def refresh_weights(self) -> None:
        pass  # the model's own parameters are the pieces

    # ------------------------------------------------------------ whole tensors

    def consolidate(self, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        return consolidate(self.processes, pieces)

    def full_state_dict(self) -> dict[str, Tensor]:
        return self.consolidate(self.trained() | self.frozen())


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        device: ``auto`` (this process' GPU if there are any), ``cpu``, ``cuda`` (the same) or ``cuda:N``.

    Raises:
        ValueError: for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type != "cuda":
        return resolved
    if not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r}, but torch {torch.__version__} sees no GPU; use --device cpu or install a CUDA build"
        )
    index = local_rank if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine wants GPU {index}, but there are {torch.cuda.device_count()}; start "
            f"it with --nproc_per_node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on GPUs and float32 on CPUs.

    Raises:
        ValueError: for an unknown dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def retie(model: nn.Module) -> None:
    """Leaving the meta device gives every name a storage of its own."""
    language_model = getattr(model, "language_model", None)
    if language_model is not None:
        language_model.tie_weights()


def _require_float32_masters(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _fresh_slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """AdamW's state as it is before its first update."""
    if (make := getattr(optimizer, "_new_buffer", None)) is not None:  # torchao's 8-bit states
        return {"step": torch.tensor(0.0), "exp_avg": make(parameter, True), "exp_avg_sq": make(parameter, False)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=_local(parameter).device),
        **{slot: torch.zeros_like(parameter, requires_grad=False) for slot in SLOTS},
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
