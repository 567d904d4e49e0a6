"""The model against the reference model's golden tensors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from echo4o.model import Bagel, BagelConfig, LLMConfig, ViTConfig
from echo4o.model.mot import Blocks, Qwen2ForCausalLM

from .reference import ALL_CASES, Reference


@pytest.fixture(params=ALL_CASES)
def case(request, parity) -> Reference:
    return Reference(parity / request.param)


def losses(out) -> dict[str, torch.Tensor]:
    parts = {}
    if out.ce is not None:
        parts["loss_ce"] = out.ce.sum() / len(out.ce)
    if out.mse is not None:
        parts["loss_mse"] = out.mse.mean(-1).sum() / len(out.mse)
    parts["loss"] = sum(parts.values())
    return parts


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def assert_gradient_norms(model: nn.Module, expected: dict[str, float]) -> None:
    for name, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        reference = expected.get(name) or 0.0
        # The k_proj bias of the ViT has a mathematically zero gradient: rounding only.
        assert norm == pytest.approx(reference, rel=2e-4, abs=2e-6), name


def test_forward_and_gradients(case: Reference) -> None:
    model = Bagel.from_pretrained(case.folder)
    batch = case.batch()
    batch.validate()
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = output

        return hook

    for i, layer in enumerate(model.language_model.model.layers):
        layer.register_forward_hook(keep(f"layer_{i}_output"))
    if model.config.visual_und:
        model.vit_model.register_forward_hook(keep("vit_output"))
        model.connector.register_forward_hook(keep("connector_output"))
    model.language_model.model.register_forward_pre_hook(
        lambda module, args: seen.update(packed_sequence=Blocks(*args[:2]))
    )

    out = model(batch, case.latents(), noise=case.noise())

    order = model._order(
        batch, *(0 if x is None else len(x) for x in (batch.packed_vit_token_indexes, batch.packed_vae_token_indexes))
    )
    for name, value in seen.items():
        if name in case.outputs:
            close(order.to_sequence(value) if isinstance(value, tuple) else value, case.outputs[name])
    assert {"packed_sequence", "layer_0_output"} <= set(seen) & set(case.outputs)
    close(out.last_hidden_state, case.outputs["last_hidden_state"])
    for name in ("mse", "ce"):
        assert (getattr(out, name) is None) == (name not in case.outputs)
        if name in case.outputs:
            close(getattr(out, name), case.outputs[name])
    for name, value in losses(out).items():
        assert value.item() == pytest.approx(case.expected[name], rel=1e-5)

    losses(out)["loss"].backward()
    assert_gradient_norms(model, case.expected["param_grad_norms"])
    checked = 0
    for name, parameter in model.named_parameters():
        if f"grad/{name}" in case.outputs:
            close(parameter.grad, case.outputs[f"grad/{name}"])
            checked += 1
    assert checked
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(case.expected["grad_norm"], rel=1e-4)


def test_rows_that_feed_no_loss_may_be_skipped(case: Reference) -> None:
    """`return_hidden=False` computes fewer rows of the last layer, and the same losses and gradients."""
    model = Bagel.from_pretrained(case.folder)
    losses(model(case.batch(), case.latents(), noise=case.noise(), return_hidden=False))["loss"].backward()
    assert_gradient_norms(model, case.expected["param_grad_norms"])


def test_freeze_und(case: Reference) -> None:
    expected = case.expected["freeze_und"]
    if case.folder.name == "dense":
        with pytest.raises(ValueError, match="Qwen2DecoderLayer"):
            BagelConfig.from_pretrained(case.folder, freeze_und=True)
        return
    model = Bagel.from_pretrained(case.folder, config=BagelConfig.from_pretrained(case.folder, freeze_und=True))
    loss = losses(model(case.batch(), case.latents(), noise=case.noise()))["loss"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    loss.backward()
    assert_gradient_norms(model, expected["param_grad_norms"])


def test_three_adamw_steps(case: Reference) -> None:
    expected = case.expected["train"]
    options = expected["optimizer"]
    model = Bagel.from_pretrained(case.folder)
    batch, latents, noise = case.batch(), case.latents(), case.noise()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
    )
    for step in expected["steps"]:
        loss = losses(model(batch, latents, noise=noise))["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, options["clip"])
        assert loss.item() == pytest.approx(step["loss"], rel=1e-4)
        assert norm.item() == pytest.approx(step["grad_norm"], rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    excluded = set(expected["ill_conditioned_params"])
    state = dict(model.named_parameters())
    for name, tensor in case.outputs.items():
        if name.startswith("after3/") and name.removeprefix("after3/") not in excluded:
            torch.testing.assert_close(state[name.removeprefix("after3/")], tensor, atol=5e-5, rtol=1e-3)


def test_7b_manifest(shared) -> None:
    """The 7B configuration has exactly the published tensors, built without memory."""
    manifest = json.loads((shared / "manifest" / "bagel_7b_mot.json").read_text())["model"]
    config = BagelConfig(
        llm=_qwen2_7b(), vit=_siglip_so400m(), vae=None, max_latent_size=64, vit_max_num_patch_per_side=70
    )
    with torch.device("meta"):
        model = Bagel(config)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == manifest
    assert len(manifest) == 1223


def _qwen2_7b():
    return LLMConfig(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, rms_norm_eps=1e-6, rope_theta=1e6, layer_module="Qwen2MoTDecoderLayer", qk_norm=True,
        tie_word_embeddings=False,
    )  # fmt: skip


def _siglip_so400m():
    return ViTConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=980,
        patch_size=14,
    )


def test_copy_init(parity) -> None:
    """`init_moe` copies exactly the reference's pairs."""
    expected = json.loads((parity / "extra" / "copy_init" / "outputs.json").read_text())
    base = expected["fresh_init_llm_config"]
    for variant, record in expected["variants"].items():
        layer_module, _, option = variant.partition(", ")
        known = {key: value for key, value in base.items() if key in LLMConfig.__annotations__}
        known |= dict(layer_module=layer_module, qk_norm=option != "qk_norm=False", tie_word_embeddings=False)
        model = Qwen2ForCausalLM(LLMConfig(**known))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert sorted(model.init_moe()) == sorted(tuple(pair) for pair in record["copied"])
        for name, parameter in model.named_parameters():
            source = dict(record["copied"]).get(name, name)
            assert torch.equal(parameter, before[source]), name


def test_fresh_initialisation(parity) -> None:
    expected = json.loads((parity / "extra" / "copy_init" / "outputs.json").read_text())["fresh_init"]
    torch.manual_seed(0)
    model = Bagel(
        BagelConfig.from_pretrained(parity / "extra" / "no_qk_norm", layer_module="Qwen2MoTDecoderLayer", qk_norm=True)
    )
    compared = 0
    for name, parameter in model.named_parameters():
        record = expected.get(name)
        if record in ("zeros", "ones"):
            assert torch.equal(parameter, torch.full_like(parameter, float(record == "ones"))), name
            compared += 1
        elif record and not name.endswith("pos_embed.pos_embed") and parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(record["std"], rel=0.15), name
            compared += 1
    assert compared > 50
