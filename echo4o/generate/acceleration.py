"""Fewer evaluations of the network while drawing: forecasts of its features, and guidance differences used again.

Both are off by default, because they change the picture: README.md has a table of what they save and what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TaylorSeer:
    """Forecasts the last layer's output of one guidance branch by finite differences ("From Reusing to Forecasting",
    Liu et al., 2025), with BAGEL's schedule: the first steps are computed, then every third.

    BAGEL keeps coefficients of every layer, but a forecast layer ignores its input: only the last one's matter. The
    state belongs to one branch of one picture, so nothing of it is left for the next call.

    Attributes:
        warm_up: steps that are computed first.
        interval: afterwards one step in so many is computed.
        max_order: of the highest finite difference.
    """

    warm_up: int = 5
    interval: int = 3
    max_order: int = 6
    differences: list[Tensor] = field(default_factory=list)
    step: int = 0  # evaluations of this branch so far
    last: int = 0  # the last computed one

    @property
    def is_due(self) -> bool:
        """Whether this step must be computed."""
        return self.step < self.warm_up or self.step - self.last >= self.interval

    def computed(self, features: Tensor) -> Tensor:
        """Take in the features (n, hidden) of a computed step; returns them."""
        new = [features]
        if self.step >= self.warm_up - 1:  # upstream differentiates from the last step of the warm-up on
            distance = self.step - self.last
            for order in range(min(self.max_order, len(self.differences))):
                new.append((new[order] - self.differences[order]) / distance)
        self.differences, self.last = new, self.step
        self.step += 1
        return features

    def forecast(self) -> Tensor:
        """Features (n, hidden) of this step, not computed: Σ_k D_k · x^k / k!, x steps after the last computed one."""
        x = self.step - self.last
        self.step += 1
        total, factor = self.differences[0], 1.0
        for order, difference in enumerate(self.differences[1:], start=1):
            factor *= x / order
            total = total + factor * difference
        return total


@dataclass
class BranchCache:
    """How far a guidance branch's velocity lay from the full one's, computed once in `every` steps, else used again."""

    every: int
    step: int = 0
    difference: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether this step must be computed."""
        return self.step % self.every == 0

    def velocity(self, full: Tensor, branch: Tensor | None) -> Tensor:
        """The branch's velocity (n, p·p·C) of this step: `branch` where it is known, else from the full one."""
        self.step += 1
        if branch is not None:
            self.difference = full - branch
            return branch
        assert self.difference is not None
        return full - self.difference
