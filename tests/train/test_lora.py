"""LoRA adapters: which layers, how they start, and their gradients against a dense reference."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from echo4o.checkpoint.names import is_adapter, public_name
from echo4o.checkpoint.pieces import Piece, whole
from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.train.lora import add_lora, init_adapters, target_layers
from echo4o.train.parallelize import apply_activation_checkpointing
from echo4o.train.selection import choose_trainable, trainable_parameters
from tests.model.reference import Reference
from tests.train.tiny_run import tiny_config

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def on_meta(**llm: object) -> Bagel:
    config = tiny_config()
    with torch.device("meta"):
        return Bagel(dataclasses.replace(config, llm=dataclasses.replace(config.llm, **llm)))


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {public_name(name): p for name, p in model.named_parameters() if is_adapter(name)}


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """As a run begins, but with B not zero, so that every adapter has an effect and a gradient."""
    init_adapters({name: whole(p) for name, p in adapters_of(model).items()}, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters_of(model).items():
        if ".lora_B." in name:
            parameter.normal_(std=0.05, generator=generator)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("gen",), [f"{n}_moe_gen" for n in ATTENTION] + [f"mlp_moe_gen.{n}" for n in MLP]),
        (("und",), [*ATTENTION, *(f"mlp.{n}" for n in MLP)]),
        (("q_proj_moe_gen", "v_proj_moe_gen"), ["self_attn.q_proj_moe_gen", "self_attn.v_proj_moe_gen"]),
    ],
)
def test_decoder_layers_that_are_adapted(targets: tuple[str, ...], expected: list[str]) -> None:
    layers = [f"language_model.model.layers.{i}.{name}" for i in range(2) for name in expected]
    assert sorted(target_layers(on_meta(), targets)) == sorted(layers)


def test_other_sets_that_are_adapted() -> None:
    assert target_layers(on_meta(), ("connector",)) == ["connector.fc1", "connector.fc2"]
    assert set(target_layers(on_meta(), ("heads",))) == {
        "time_embedder.mlp.0",
        "time_embedder.mlp.2",
        "vae2llm",
        "llm2vae",
    }
    assert all(name.startswith("vit_model.") for name in target_layers(on_meta(), ("vit",)))
    moe = on_meta(layer_module="Qwen2MoEDecoderLayer")
    assert {name.split(".")[-2] for name in target_layers(moe, ("gen",))} == {"mlp_moe_gen"}


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (
            {"layer_module": "Qwen2DecoderLayer"},
            ("gen",),
            "Qwen2DecoderLayer has no generation experts for gen; use und",
        ),
        ({}, ("conector",), "Did you mean connector"),
        ({}, ("q_proj_moegen",), "Did you mean .*q_proj_moe_gen"),
        ({}, ("embeddings",), "embeddings cannot be adapted; choose from gen"),
        ({"freeze_und": True}, ("gen", "connector"), "get no gradient with freeze_und True, e.g. connector.fc1"),
    ],
)
def test_targets_without_layers_are_refused(model: dict, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(on_meta(**model), rank=2, targets=targets)


def test_missing_peft_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'echo4o\[lora\]'"):
        add_lora(on_meta(), rank=2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_adapters_train_in_float32_and_names_are_upstreams(device: str) -> None:
    with torch.device(device):
        model = Bagel(tiny_config()).bfloat16()
    names = set(model.state_dict())
    layers = add_lora(model, rank=4)
    choose_trainable(model)
    trained = trainable_parameters(model)
    assert {public_name(name) for name in trained} == {f"{x}.lora_{k}.weight" for x in layers for k in "AB"}
    assert all(p.dtype == torch.float32 and p.device.type == device for p in trained.values())
    assert {public_name(name) for name in model.state_dict() if not is_adapter(name)} == names


def test_further_parameters_train_beside_adapters() -> None:
    model = on_meta()
    layers = add_lora(model, rank=4, targets=("gen", "llm2vae"))
    choose_trainable(model, train_only=("heads", "q_norm_moe_gen"))
    others = {public_name(n) for n in trainable_parameters(model) if not is_adapter(n)}
    assert "vae2llm.weight" in others and not any("llm2vae" in name for name in others)  # adapted: its base is frozen
    assert "language_model.model.layers.0.self_attn.q_norm_moe_gen.weight" in others
    assert len(adapters_of(model)) == 2 * len(layers)


def test_start_does_not_depend_on_how_weights_are_divided() -> None:
    model = Bagel(tiny_config())
    add_lora(model, rank=3)
    init_adapters({name: whole(p) for name, p in adapters_of(model).items()}, seed=7)
    for name, parameter in adapters_of(model).items():
        if ".lora_B." in name:
            assert not parameter.any()
            continue
        bound = parameter.shape[1] ** -0.5
        assert 0.5 * bound < parameter.abs().max() <= bound
        parts = torch.full((parameter.numel(),), torch.nan)
        for start, stop in ((0, 5), (5, 5), (5, 40), (40, parameter.numel())):
            init_adapters({name: Piece(tuple(parameter.shape), start, parts[start:stop])}, seed=7)
        assert torch.equal(parts, parameter.detach().reshape(-1))
    values = list(adapters_of(model).values())
    assert not torch.equal(values[0][:, :8], values[2][:, :8])  # each layer has numbers of its own


# ---------------------------------------------------------------- computation


def loss_of(model: nn.Module, reference: Reference, weights: dict[str, Tensor] | None = None) -> Tensor:
    inputs = (reference.batch(), reference.latents(), reference.noise())
    options = {"return_hidden": False}
    output = functional_call(model, weights, inputs, options) if weights else model(*inputs, **options)
    return torch.stack([part.mean() for part in (output.mse, output.ce) if part is not None]).sum()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("case", "freeze_und", "targets"),
    [
        ("multiref", True, ("gen",)),
        ("mixed", False, ("gen", "und", "vit", "connector", "heads")),
        ("extra/moe", False, ("gen", "und")),
    ],
)
def test_gradients_equal_those_of_explicit_weights(
    parity: Path, case: str, freeze_und: bool, targets: tuple[str, ...], checkpointing: str
) -> None:
    reference = Reference(parity / case)
    model = Bagel.from_pretrained(parity / case, freeze_und=freeze_und)
    layers = add_lora(model, rank=3, alpha=5, targets=targets)
    choose_trainable(model)
    fill(model)
    apply_activation_checkpointing(model, checkpointing)
    loss = loss_of(model, reference)
    loss.backward()
    found = adapters_of(model)

    plain = Bagel.from_pretrained(parity / case, freeze_und=freeze_und).requires_grad_(False)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in found.items()}
    weights = dict(plain.named_parameters())
    for name in layers:
        a, b = leaves[f"{name}.lora_A.weight"], leaves[f"{name}.lora_B.weight"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 5 / 3 * b @ a
    expected = loss_of(plain, reference, weights)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    unreached = [name for name, leaf in leaves.items() if leaf.grad is None]
    assert all(found[name].grad is None or not found[name].grad.any() for name in unreached)
    assert len(unreached) < len(leaves) / 2
    for name in set(leaves) - set(unreached):
        torch.testing.assert_close(
            found[name].grad, leaves[name].grad, rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_new_adapter_changes_nothing(parity: Path) -> None:
    reference = Reference(parity / "multiref")
    before = loss_of(Bagel.from_pretrained(parity / "multiref"), reference)
    model = Bagel.from_pretrained(parity / "multiref")
    add_lora(model, rank=4, dropout=0.5)
    init_adapters({name: whole(p) for name, p in adapters_of(model).items()}, seed=1)
    assert torch.equal(loss_of(model, reference), before)


def test_recomputation_repeats_dropout(parity: Path) -> None:
    """Without restored generators the recomputed layers would draw other masks: wrong gradients, no error."""
    reference = Reference(parity / "multiref")
    gradients = []
    for mode in ("none", "full"):
        model = Bagel.from_pretrained(parity / "multiref")
        add_lora(model, rank=4, dropout=0.5)
        fill(model)
        apply_activation_checkpointing(model, mode, draws_random_numbers=True)
        torch.manual_seed(3)
        loss_of(model, reference).backward()
        gradients.append({name: p.grad for name, p in adapters_of(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_start_is_the_same_in_every_process() -> None:
    """Names are hashed by SHA-256, not by Python's salted hash."""
    code = (
        "import torch, json; from echo4o.train.lora import init_adapters; from echo4o.checkpoint.pieces import whole\n"
        "a = torch.empty(2, 4); init_adapters({'x.lora_A.weight': whole(a)}, 5); print(json.dumps(a.tolist()))"
    )
    outputs = []
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
