"""AdamW, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from echo4o.checkpoint.names import public_name
from echo4o.config import ConfigError
from echo4o.train.selection import freeze, nothing_matches, selector, trainable_parameters

__all__ = [
    "build_optimizer",
    "freeze",
    "lr_schedule",
    "parameter_groups",
    "set_learning_rate",
    "trainable_parameters",
]

SCHEDULES = ("constant", "cosine")


def build_optimizer(
    model: nn.Module,
    kind: str = "adamw",
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    lr_groups: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over everything that trains, in parameter groups (`parameter_groups`).

    Args:
        kind: ``adamw`` (float32 states, fused) or ``adamw_8bit`` (torchao's; a quarter of the memory).
        lr_groups: pattern → learning rate of the parameters it matches.

    Raises:
        ConfigError: if nothing trains, a pattern matches nothing, or `kind` cannot run here.
    """
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, lr_groups=lr_groups or {})
    options: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": 0.0}
    parameters = [parameter for group in groups for parameter in group["params"]]
    if kind == "adamw_8bit":
        return _adamw_8bit()(groups, **options)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, **options, fused=fused)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, lr_groups: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups of what trains, by learning rate and decay: matrices decay, vectors (norms and biases) never do.

    Each group holds ``lr_scale``, its learning rate over `lr`: a schedule of `lr` times that is the group's.

    Args:
        lr_groups: sets or patterns of names (`echo4o.train.selection`); the first that matches a parameter counts.

    Raises:
        ConfigError: if nothing trains, or a pattern is the first match of nothing.
    """
    named = {public_name(name): parameter for name, parameter in trainable_parameters(model).items()}
    if not named:
        raise ConfigError("nothing is trainable: all parts are frozen. Set freeze_llm or freeze_vit to False.")
    patterns = {pattern: selector(pattern) for pattern in lr_groups}
    members: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        first = next((pattern for pattern, matches in patterns.items() if matches(name)), None)
        members.setdefault((first, parameter.ndim >= 2), []).append(parameter)
    used = {pattern for pattern, _ in members}
    for pattern, matches in patterns.items():
        if pattern not in used and any(matches(name) for name in named):
            raise ConfigError(f"lr_groups: earlier entries match all that {pattern!r} does; put it before them")
        if pattern not in used:
            raise ConfigError(f"{nothing_matches('lr_groups', pattern, named)} Only what trains is asked.")
    groups = []
    for (pattern, decays), parameters in members.items():
        rate = lr if pattern is None else lr_groups[pattern]
        scale = rate / lr if lr else 1.0
        decay = weight_decay if decays else 0.0
        groups.append({"params": parameters, "weight_decay": decay, "lr": rate, "lr_scale": scale})
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of the base rate `lr`."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # torchao's optimisers refuse to have it replaced
        else:
            group["lr"] = rate


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    if not torch.cuda.is_available():
        raise ConfigError("optimizer adamw_8bit needs a GPU, and torch sees none: use --optimizer adamw")
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"optimizer adamw_8bit needs torchao ({error}): pip install 'echo4o[8bit]'") from error
    return AdamW8bit


def lr_schedule(kind: str, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate of the update after `num_done` updates: linear warm-up, then constant or cosine down to `min_lr`.

    As transformers' schedules, which upstream uses: the very first update of a warm-up has learning rate 0.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown lr_scheduler {kind!r}; known: {', '.join(SCHEDULES)}")

    def at(num_done: int) -> float:
        if num_done < warmup_steps:
            return lr * num_done / max(1, warmup_steps)
        if kind == "constant":
            return lr
        progress = (num_done - warmup_steps) / max(1, total_steps - warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        floor = min_lr / lr if lr else 0.0
        return lr * max(0.0, cosine * (1 - floor) + floor)

    return at
