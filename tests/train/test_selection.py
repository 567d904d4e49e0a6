"""What trains: sets, patterns, frozen parts, and what no gradient reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.model.parts import part_of
from echo4o.train.selection import choose_trainable, cut_by_freeze_und, freeze, trainable_parameters
from tests.model.reference import Reference
from tests.train.tiny_run import tiny_config

DECODER = "language_model.model."


def tiny_bagel(freeze_und: bool = False) -> Bagel:
    with torch.device("meta"):
        return Bagel(tiny_config().with_freeze_und(freeze_und))


def trained(model: Bagel) -> set[str]:
    return set(trainable_parameters(model))


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [({}, ()), ({"freeze_llm": True}, ("language_model.",)), ({"freeze_vit": True}, ("vit_model.",))],
)
def test_freezing_takes_whole_parts_and_always_the_tables(flags: dict[str, bool], frozen: tuple[str, ...]) -> None:
    model = tiny_bagel()
    choose_trainable(model, **flags)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith((*frozen, "latent_pos_embed.", "vit_pos_embed."))


@pytest.mark.parametrize("case", ["multiref", "mixed", "frames", "extra/moe", "extra/tied", "extra/gen_only"])
def test_freeze_und_freezes_exactly_what_gets_no_gradient(parity: Path, case: str) -> None:
    reference = Reference(parity / case)
    model = Bagel.from_pretrained(parity / case, freeze_und=True)
    # A next-token loss reaches lm_head; without one its gradient is zero, but it would learn from the next batch.
    freeze(model)
    output = model(reference.batch(), reference.latents(), reference.noise(), return_hidden=False)
    losses = [part.sum() for part in (output.mse, output.ce) if part is not None]
    torch.stack(losses).sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    everything = trained(model)
    choose_trainable(model)
    assert trained(model) == reached
    assert everything - reached == cut_by_freeze_und(model)
    recorded = reference.expected["freeze_und"]["param_grad_norms"]
    assert all(norm == 0 for name, norm in recorded.items() if name not in reached)


@pytest.mark.parametrize("freeze_und", [False, True])
def test_a_step_is_the_same_with_and_without_what_is_cut(parity: Path, freeze_und: bool) -> None:
    states = []
    for choose in (freeze, choose_trainable):
        reference = Reference(parity / "multiref")
        model = Bagel.from_pretrained(parity / "multiref", freeze_und=freeze_und)
        choose(model)
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3, weight_decay=0.0)
        for _ in range(2):
            output = model(reference.batch(), reference.latents(), reference.noise(), return_hidden=False)
            assert output.mse is not None
            output.mse.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("heads",), lambda name: part_of(name) == "latent heads"),
        (("gen", "connector"), lambda name: part_of(name) in ("generation experts", "connector")),
        (("embeddings",), lambda name: "embed_tokens" in name or "lm_head" in name),
        ((r"layers\.1\..*norm",), lambda name: f"{DECODER}layers.1." in name and "norm" in name),
        (("_proj_moe_gen.weight$",), lambda name: name.endswith("_proj_moe_gen.weight")),
    ],
)
def test_train_only_takes_sets_and_patterns(patterns, expected) -> None:
    model = tiny_bagel()
    choose_trainable(model, train_only=patterns)
    assert trained(model) == {name for name, _ in model.named_parameters() if expected(name)}


@pytest.mark.parametrize(
    ("pattern", "flags", "message"),
    [
        ("conector", {}, "Did you mean connector"),
        ("q_proj_moe_gem", {}, "Did you mean .*q_proj_moe_gen"),
        ("xyz", {}, "Give gen, und, vit, connector, heads, embeddings, or patterns of names"),
        ("latent_pos_embed", {}, "matches only parameters that cannot train"),
        ("gen", {"freeze_llm": True}, "clear freeze_llm"),
    ],
)
def test_train_only_without_a_match_names_the_nearest(pattern: str, flags: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_trainable(tiny_bagel(), train_only=(pattern,), **flags)
    with pytest.raises(ConfigError, match="cannot train"):
        choose_trainable(tiny_bagel(freeze_und=True), train_only=("connector",))
