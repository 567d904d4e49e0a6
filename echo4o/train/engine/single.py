"""One process: a CPU or one GPU. float32 master weights; matrix products in bfloat16 through autocast where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from echo4o.train.optim import trainable_parameters

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SingleProcessEngine:
    """See `echo4o.train.engine.protocol.Engine`.

    Args:
        device: ``auto`` (first GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (bfloat16 on GPUs, float32 on CPUs), ``float32`` or ``bfloat16``.

    Raises:
        ValueError: for a device that is not there or an unknown dtype.
    """

    rank = 0
    world_size = 1
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, device: str = "auto", dtype: str = "auto") -> None:
        self.device = _resolve_device(device)
        self.compute_dtype = _resolve_dtype(dtype, self.device)
        self._names: dict[str, nn.Parameter] = {}

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.module = model.to(self.device)
        self.optimizer = build_optimizer(self.module)
        self._names = trainable_parameters(self.module)
        return self.module

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
        gradients = [p.grad for p in self._names.values() if p.grad is not None]
        if not gradients:
            return 0.0
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0 and bool(torch.isfinite(norm)):
            nn.utils.clip_grads_with_norm_(list(self._names.values()), max_norm, norm)
        return float(norm)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        slots = self.optimizer.state
        return {
            "model": {name: parameter.detach() for name, parameter in self._names.items()},
            "optimizer": {
                name: dict(slots[parameter]) for name, parameter in self._names.items() if slots.get(parameter)
            },
        }

    def empty_state(self, keys: set[str]) -> dict[str, Any]:
        optimizer = {}
        for name, parameter in self._names.items():
            if f"optimizer.{name}.exp_avg" in keys:
                optimizer[name] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
        return {"model": {name: parameter.detach() for name, parameter in self._names.items()}, "optimizer": optimizer}

    def load_state(self, state: Mapping[str, Any]) -> None:
        # The model's tensors were loaded in place; AdamW gets fresh slots.
        for name, slots in state["optimizer"].items():
            self.optimizer.state[self._names[name]] = dict(slots)

    def consolidate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def full_state_dict(self) -> dict[str, Tensor]:
        return self.consolidate(self.module.state_dict())


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r}, but torch {torch.__version__} sees no GPU; use --device cpu or install a CUDA build"
        )
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
