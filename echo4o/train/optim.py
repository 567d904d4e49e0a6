"""AdamW, its parameter groups, the learning-rate schedule, and what is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

POSITION_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
SCHEDULES = ("constant", "cosine")


def freeze(model: nn.Module, *, freeze_llm: bool = False, freeze_vit: bool = False) -> None:
    """Switch gradients off for whole parts; the sin-cos position tables never train.

    ``freeze_und`` cuts gradients inside the model and is part of its config.
    """
    prefixes = ["language_model."] * freeze_llm + ["vit_model."] * freeze_vit
    for name, parameter in model.named_parameters():
        if name in POSITION_TABLES or any(name.startswith(prefix) for prefix in prefixes):
            parameter.requires_grad_(False)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that trains; a tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_adamw(
    model: nn.Module, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over everything that trains; matrices decay, vectors (norms and biases) never do.

    Raises:
        ValueError: if nothing trains.
    """
    named = trainable_parameters(model)
    if not named:
        raise ValueError("nothing is trainable: all parts are frozen. Set freeze_llm or freeze_vit to False.")
    decaying = [p for p in named.values() if p.ndim >= 2]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, weight_decay), (others, 0.0))
        if parameters
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in named.values())
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=fused)


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
