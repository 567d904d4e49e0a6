"""Recomputation changes memory, never numbers or names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echo4o.model import Bagel
from echo4o.train.parallelize import apply_activation_checkpointing, blocks, compile_blocks
from tests.model.reference import Reference


def loss_and_gradients(model: Bagel, reference: Reference) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(reference.batch(), reference.latents(), reference.noise(), return_hidden=False)
    loss = output.mse.mean() + output.ce.mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_gives_the_same_gradients_and_keeps_names(mode: str, parity: Path) -> None:
    reference = Reference(parity / "mixed")
    plain, recomputed = Bagel.from_pretrained(parity / "mixed"), Bagel.from_pretrained(parity / "mixed")
    apply_activation_checkpointing(recomputed, mode)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    calls = []
    layer = recomputed.language_model.model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    expected_loss, expected = loss_and_gradients(plain, reference)
    found_loss, found = loss_and_gradients(recomputed, reference)
    assert len(calls) == 2, "once in the forward pass and once more in the backward pass"
    assert torch.equal(expected_loss, found_loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_full_keeps_less_than_none(parity: Path) -> None:
    reference = Reference(parity / "mixed")
    kept = {}
    for mode in ("none", "full"):
        model = Bagel.from_pretrained(parity / "mixed")
        apply_activation_checkpointing(model, mode)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(reference.batch(), reference.latents(), reference.noise(), return_hidden=False)
        kept[mode] = sum(seen.values())
    assert kept["full"] < 0.7 * kept["none"]


def test_blocks_are_decoder_and_vit_layers(parity: Path) -> None:
    model = Bagel.from_pretrained(parity / "mixed")
    assert len(list(blocks(model))) == model.config.llm.num_hidden_layers + model.config.num_vit_layers
    without_vit = Bagel.from_pretrained(parity / "extra" / "gen_only")
    assert len(list(blocks(without_vit))) == without_vit.config.llm.num_hidden_layers


def test_compile_marks_every_block_and_keeps_names(parity: Path) -> None:
    model = Bagel.from_pretrained(parity / "mixed")
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in blocks(model))


def test_unknown_mode_is_refused(parity: Path) -> None:
    model = Bagel.from_pretrained(parity / "mixed")
    with pytest.raises(ValueError, match="none, selective, full"):
        apply_activation_checkpointing(model, "sometimes")
