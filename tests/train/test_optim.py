"""Schedules as transformers has them, parameter groups, freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from echo4o.model import Bagel
from echo4o.train.optim import build_adamw, freeze, lr_schedule, trainable_parameters
from tests.train.tiny_run import tiny_config


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_schedule_is_upstreams(kind: str, warmup_steps: int) -> None:
    from transformers import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

    lr, min_lr, total_steps = 2e-4, 1e-6, 30
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    if kind == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    else:
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, total_steps, min_lr=min_lr)
    ours = lr_schedule(kind, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps, total_steps=total_steps)
    for num_done in range(total_steps):
        assert ours(num_done) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="constant, cosine"):
        lr_schedule("linear", lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=1)


def test_only_matrices_decay() -> None:
    model = Bagel(tiny_config())
    freeze(model)
    optimizer = build_adamw(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = trainable_parameters(model)
    assert set(decay) == {id(p) for p in named.values()}
    assert all(decay[id(p)] == (0.1 if p.ndim >= 2 else 0.0) for p in named.values())


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [({}, ()), ({"freeze_llm": True}, ("language_model.",)), ({"freeze_vit": True}, ("vit_model.",))],
)
def test_freezing_takes_whole_parts_and_always_the_tables(flags: dict[str, bool], frozen: tuple[str, ...]) -> None:
    model = Bagel(tiny_config())
    freeze(model, **flags)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith((*frozen, "latent_pos_embed.", "vit_pos_embed."))


def test_nothing_trainable_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="freeze_llm"):
        build_adamw(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15)
