"""Schedules as transformers has them, parameter groups, 8-bit states."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.train.optim import build_optimizer, lr_schedule, parameter_groups, set_learning_rate
from echo4o.train.selection import freeze, trainable_parameters
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


def groups_of(model: nn.Module, **options) -> dict[str, dict]:
    """Name → its group's settings."""
    optimizer = build_optimizer(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15, **options)
    of = {id(p): {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups for p in g["params"]}
    named = trainable_parameters(model)
    assert set(of) == {id(p) for p in named.values()}
    return {name: of[id(p)] for name, p in named.items()}


def test_only_matrices_decay() -> None:
    model = Bagel(tiny_config())
    freeze(model)
    groups = groups_of(model, weight_decay=0.1)
    named = trainable_parameters(model)
    assert all(groups[name]["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0) for name, p in named.items())
    assert all(group["lr_scale"] == 1.0 and group["fused"] for group in groups.values())


def test_first_matching_entry_gives_the_learning_rate() -> None:
    model = Bagel(tiny_config())
    freeze(model)
    rates = {"connector.fc1": 5e-3, "connector": 2e-3, r"_moe_gen\.bias$": 1e-4}
    groups = groups_of(model, weight_decay=0.1, lr_groups=rates)
    for name, group in groups.items():
        expected = 1e-3
        if name.startswith("connector."):
            expected = 5e-3 if "fc1" in name else 2e-3
        elif name.endswith("_moe_gen.bias"):
            expected = 1e-4
        assert group["lr"] == pytest.approx(expected) and group["lr_scale"] == pytest.approx(expected / 1e-3)
        assert group["weight_decay"] == (0.1 if name.endswith("weight") and "norm" not in name else 0.0)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"conector": 1e-3}, "Did you mean connector"),
        ({"connector": 1e-3, "connector.fc1": 1e-4}, "earlier entries match all that 'connector.fc1' does"),
        ({"pos_embed": 1e-3}, "Only what trains is asked"),
    ],
)
def test_learning_rate_of_nothing_is_refused(rates: dict[str, float], message: str) -> None:
    model = Bagel(tiny_config())
    freeze(model)
    with pytest.raises(ConfigError, match=message):
        groups_of(model, lr_groups=rates)


def test_schedule_scales_every_group() -> None:
    model = Bagel(tiny_config())
    freeze(model)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, lr_groups={"vit": 1e-4})
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)  # as torchao holds it
    set_learning_rate(optimizer, 5e-4)
    rates = sorted({round(float(group["lr"]), 9) for group in optimizer.param_groups})
    assert rates == [5e-5, 5e-4]
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_eight_bit_states_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-15}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use --optimizer adamw"):
        build_optimizer(nn.Linear(2, 2), "adamw_8bit", **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'echo4o\[8bit\]'"):
        build_optimizer(nn.Linear(2, 2), "adamw_8bit", **options)


def test_nothing_trainable_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="freeze_llm"):
        build_optimizer(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15)
