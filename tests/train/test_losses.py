"""Losses: normalised over the whole step, equal to the reference, broken down by data set and time step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echo4o.model import Bagel
from echo4o.model.embeddings import shift_time
from echo4o.packed import PackedBatch
from echo4o.train.losses import LossBreakdown, StepTotals, micro_loss
from tests.model.reference import Reference


def make_batch(num_ce: int, num_mse: int, weights: list[float] | None = None) -> PackedBatch:
    """A batch of one text sample and one image sample; only what the losses read is meaningful."""
    num_text, num_vae = max(num_ce, 1), max(num_mse, 1)
    length = num_text + num_vae
    batch = PackedBatch(
        sequence_length=length,
        sample_lens=[num_text, num_vae],
        split_lens=[num_text, num_vae],
        attn_modes=["causal", "noise"],
        packed_text_ids=torch.zeros(num_text, dtype=torch.int64),
        packed_text_indexes=torch.arange(num_text),
        packed_position_ids=torch.zeros(length, dtype=torch.int64),
        packed_vae_token_indexes=torch.arange(num_text, length),
        packed_timesteps=torch.linspace(-4, 4, num_vae),
        sample_names=["chat", "pictures"],
    )
    if num_ce:
        batch.ce_loss_indexes = torch.arange(num_ce)
        batch.ce_loss_weights = torch.tensor(weights or [1.0] * num_ce)
    if num_mse:
        batch.mse_loss_indexes = torch.arange(num_text, num_text + num_mse)
    return batch


@pytest.mark.parametrize("case", ["multiref", "mixed", "frames", "extra/und_only", "extra/gen_only"])
def test_losses_equal_the_reference(case: str, parity: Path) -> None:
    reference = Reference(parity / case)
    batch, outputs = reference.batch(), reference.outputs
    for reweighting, name in ((False, "loss_ce"), (True, "loss_ce_reweighted")):
        totals = StepTotals(*StepTotals.local([batch], reweighting).tolist())
        mse = outputs.get("mse")
        loss = micro_loss(mse, outputs.get("ce"), batch, totals, ce_loss_reweighting=reweighting)
        for found, expected in (
            (loss.ce, reference.expected.get(name)),
            (loss.mse, reference.expected.get("loss_mse")),
        ):
            assert (found is None) == (expected is None)
            if found is not None:
                assert float(found) == pytest.approx(expected, rel=1e-6)
    if "loss_ce" in reference.expected and "loss_mse" in reference.expected:
        assert float(loss.total) == pytest.approx(float(loss.ce + loss.mse), rel=1e-6)


@pytest.mark.parametrize("reweighting", [False, True])
def test_gradient_does_not_depend_on_how_tokens_are_spread(reweighting: bool) -> None:
    """One step over unequal micro-batches has the gradient of all their tokens in one batch."""
    generator = torch.Generator().manual_seed(0)
    ce_inputs = torch.randn(7, generator=generator)
    mse_inputs = torch.randn(5, 3, generator=generator)
    weights = torch.rand(7, generator=generator).tolist()
    options = {"ce_weight": 0.25, "mse_weight": 2.0, "ce_loss_reweighting": reweighting}

    def gradient(spread: list[tuple[slice, slice]]) -> tuple[torch.Tensor, float, float]:
        parameter = torch.ones(3, requires_grad=True)
        batches = [make_batch(len(range(7)[c]), len(range(5)[m]), weights[c]) for c, m in spread]
        totals = StepTotals(*StepTotals.local(batches, reweighting).tolist())
        ce_sum = mse_sum = 0.0
        for (c, m), batch in zip(spread, batches, strict=True):
            ce = (ce_inputs[c] * parameter.sum()) ** 2 if batch.num_ce_tokens else None
            mse = (mse_inputs[m] * parameter) ** 2 if batch.num_mse_tokens else None
            loss = micro_loss(mse, ce, batch, totals, **options)
            if loss.total is not None:
                loss.total.backward()
            ce_sum += float(loss.ce or 0)
            mse_sum += float(loss.mse or 0)
        return parameter.grad, ce_sum, mse_sum

    whole = gradient([(slice(0, 7), slice(0, 5))])
    spread = gradient([(slice(0, 1), slice(0, 0)), (slice(1, 7), slice(0, 4)), (slice(0, 0), slice(4, 5))])
    torch.testing.assert_close(spread[0], whole[0], rtol=1e-5, atol=1e-6)
    assert spread[1:] == pytest.approx(whole[1:], rel=1e-6)


def test_gradient_of_a_real_model_is_the_same_in_one_and_in_two_micro_batches(parity: Path) -> None:
    references = [Reference(parity / "mixed"), Reference(parity / "multiref")]
    model = Bagel.from_pretrained(parity / "mixed")

    def gradients(order: list[Reference]) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        batches = [reference.batch() for reference in order]
        totals = StepTotals(*StepTotals.local(batches, False).tolist())
        for reference, batch in zip(order, batches, strict=True):
            output = model(batch, reference.latents(), reference.noise())
            micro_loss(output.mse, output.ce, batch, totals).total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # The same tokens by hand: means per batch weighted by their share of the tokens.
    accumulated = gradients(references)
    by_hand = {name: torch.zeros_like(gradient) for name, gradient in accumulated.items()}
    num_ce = sum(reference.batch().num_ce_tokens for reference in references)
    num_mse = sum(reference.batch().num_mse_tokens for reference in references)
    for reference in references:
        model.zero_grad(set_to_none=True)
        batch = reference.batch()
        output = model(batch, reference.latents(), reference.noise())
        loss = output.mse.mean(-1).sum() / num_mse
        if output.ce is not None:
            loss = loss + output.ce.sum() / num_ce
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                by_hand[name] += parameter.grad
    for name, gradient in accumulated.items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-4, atol=1e-6)


def test_nothing_to_learn_is_no_loss() -> None:
    batch = make_batch(0, 0)
    loss = micro_loss(None, None, batch, StepTotals(0.0, 0.0))
    assert loss.total is None and loss.ce is None and loss.mse is None


def test_breakdown_by_data_set_and_shifted_time() -> None:
    batch = make_batch(num_ce=2, num_mse=4)
    ce, mse = torch.tensor([1.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    totals = StepTotals(2, 4)
    breakdown = LossBreakdown()
    breakdown.add(batch, micro_loss(mse, ce, batch, totals), timestep_shift=4.0)
    means = breakdown.means()
    assert means["ce/chat"] == 2.0
    assert means["mse/pictures"] == 2.5
    bins = {}
    for value, t in zip([1.0, 2.0, 3.0, 4.0], shift_time(batch.packed_timesteps, 4.0).tolist(), strict=True):
        bins.setdefault(f"mse/t_{min(int(t * 10), 9) / 10:.1f}", []).append(value)
    assert {name: value for name, value in means.items() if name.startswith("mse/t_")} == {
        name: sum(values) / len(values) for name, values in bins.items()
    }

    again = LossBreakdown()
    again.load_state_dict(breakdown.state_dict())
    again.merge([again.state_dict(), breakdown.state_dict()])
    assert again.means() == means
    again.reset()
    assert again.means() == {}


def test_shifted_time_is_the_models(parity: Path) -> None:
    logits = torch.tensor([-float("inf"), -2.0, 0.0, 3.0])
    expected = [0.0, *(4 * t / (1 + 3 * t) for t in torch.sigmoid(logits[1:]).tolist())]
    assert shift_time(logits, 4.0).tolist() == pytest.approx(expected, rel=1e-6)
