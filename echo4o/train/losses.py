"""Losses as sums divided by the token counts of the whole optimiser step.

The gradient of a step therefore does not depend on how its tokens are spread over micro-batches and ranks. Formulas as
upstream's train/pretrain_unified_navit.py: cross-entropy per token, squared error averaged over a token's channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from echo4o.model.embeddings import shift_time
from echo4o.packed import PackedBatch

NUM_TIME_BINS = 10


@dataclass(frozen=True)
class StepTotals:
    """What the losses of one optimiser step are divided by, summed over all its micro-batches and ranks.

    Attributes:
        ce: number of cross-entropy tokens, or the sum of their weights when reweighting.
        mse: number of latent tokens with a flow-matching loss.
    """

    ce: float
    mse: float

    @staticmethod
    def local(batches: Iterable[PackedBatch], ce_loss_reweighting: bool) -> Tensor:
        """(2,) float64 ``[ce, mse]`` of this rank's micro-batches, to be summed over ranks."""
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            weights = batch.ce_loss_weights if ce_loss_reweighting else None
            totals[0] += batch.num_ce_tokens if weights is None else float(weights.double().sum())
            totals[1] += batch.num_mse_tokens
        return totals


@dataclass
class MicroLoss:
    """One micro-batch's share of the step's loss.

    Attributes:
        total: scalar to differentiate, or None if nothing in the micro-batch is learned.
        ce / mse: detached shares, before ``ce_weight`` and ``mse_weight``; they add up to the step's losses.
        ce_tokens / mse_tokens: detached float32 losses per token, (n_ce,) and (n_mse,), or None.
    """

    total: Tensor | None
    ce: Tensor | None
    mse: Tensor | None
    ce_tokens: Tensor | None
    mse_tokens: Tensor | None


def micro_loss(
    mse: Tensor | None,
    ce: Tensor | None,
    batch: PackedBatch,
    totals: StepTotals,
    *,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    ce_loss_reweighting: bool = False,
    nothing: Tensor | None = None,
) -> MicroLoss:
    """Weigh and normalise what the model returned.

    Args:
        mse: (n_mse, channels) squared errors, or None.
        ce: (n_ce,) cross-entropies, or None.
        totals: token counts of the whole step.
        nothing: the zero to differentiate where there is no loss (sharded engines need a backward pass on every rank).
    """
    parts: list[Tensor] = []
    result = MicroLoss(nothing, None, None, None, None)
    if ce is not None and ce.numel():
        ce = ce.float()
        weighted = (
            ce * batch.ce_loss_weights.to(ce) if ce_loss_reweighting and batch.ce_loss_weights is not None else ce
        )
        share = weighted.sum() / totals.ce
        parts.append(ce_weight * share)
        result.ce, result.ce_tokens = share.detach(), ce.detach()
    if mse is not None and mse.numel():
        per_token = mse.float().mean(dim=-1)
        share = per_token.sum() / totals.mse
        parts.append(mse_weight * share)
        result.mse, result.mse_tokens = share.detach(), per_token.detach()
    if parts:
        result.total = torch.stack(parts).sum()
    return result


class LossBreakdown:
    """Running means of the per-token losses by data set and by bin of the (shifted) time step."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, batch: PackedBatch, loss: MicroLoss, timestep_shift: float) -> None:
        """Add the tokens of one micro-batch (`batch` on any device)."""
        if loss.mse_tokens is not None:
            assert batch.mse_loss_indexes is not None and batch.packed_timesteps is not None
            assert batch.packed_vae_token_indexes is not None
            indexes = batch.mse_loss_indexes.cpu()
            self._add_by_dataset("mse", batch, indexes, loss.mse_tokens)
            place = torch.searchsorted(batch.packed_vae_token_indexes.cpu().contiguous(), indexes)
            t = shift_time(batch.packed_timesteps.cpu()[place], timestep_shift)
            bins = (t * NUM_TIME_BINS).long().clamp_(0, NUM_TIME_BINS - 1)
            names = [f"mse/t_{i / NUM_TIME_BINS:.1f}" for i in range(NUM_TIME_BINS)]
            self._add(names, bins, loss.mse_tokens)
        if loss.ce_tokens is not None:
            assert batch.ce_loss_indexes is not None
            self._add_by_dataset("ce", batch, batch.ce_loss_indexes.cpu(), loss.ce_tokens)

    def _add_by_dataset(self, kind: str, batch: PackedBatch, indexes: Tensor, values: Tensor) -> None:
        if len(batch.sample_names) != len(batch.sample_lens):
            return
        ends = torch.tensor(list(accumulate(batch.sample_lens)))
        names = sorted(set(batch.sample_names))
        of_sample = torch.tensor([names.index(name) for name in batch.sample_names])
        groups = of_sample[torch.searchsorted(ends, indexes, right=True)]
        self._add([f"{kind}/{name}" for name in names], groups, values)

    def _add(self, names: list[str], groups: Tensor, values: Tensor) -> None:
        zeros = torch.zeros(len(names), dtype=torch.float64)
        sums = zeros.index_add(0, groups, values.double().cpu())
        counts = torch.bincount(groups, minlength=len(names))
        for name, total, count in zip(names, sums.tolist(), counts.tolist(), strict=True):
            if count:
                entry = self._sums.setdefault(name, [0.0, 0])
                entry[0] += total
                entry[1] += count

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in sorted(self._sums.items())}

    def merge(self, states: Iterable[Mapping[str, list[float]]]) -> None:
        """Replace the sums by those of several ranks together."""
        merged: dict[str, list[float]] = {}
        for state in states:
            for name, (total, count) in state.items():
                entry = merged.setdefault(name, [0.0, 0])
                entry[0] += total
                entry[1] += count
        self._sums = merged

    def reset(self) -> None:
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(entry) for name, entry in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self._sums = {name: list(entry) for name, entry in state.items()}
