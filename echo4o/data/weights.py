"""Weights of groups that change with the step of the run (a curriculum)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class WeightEntry:
    """From `step` on a group has `weight`; if `linear`, its weight has gone there in a straight line."""

    step: int
    weight: float
    linear: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "weight": self.weight, **({"interpolate": "linear"} if self.linear else {})}


@dataclass(frozen=True)
class WeightSchedule:
    """A group's weight by optimiser step.

    Args:
        entries: the first of step 0, their steps ascending.

    Raises:
        ValueError: if they are not.
    """

    entries: tuple[WeightEntry, ...]

    def __post_init__(self) -> None:
        if not self.entries or self.entries[0].step != 0:
            raise ValueError("the first entry must be that of step 0: say with which weight the run begins")
        for before, after in pairwise(self.entries):
            if after.step <= before.step:
                raise ValueError(f"steps must ascend, but {after.step} follows {before.step}")

    def at(self, step: int) -> float:
        """Weight of the packs that are taken once `step` optimiser steps are done."""
        last, following = self.entries[0], None
        for entry in self.entries[1:]:
            if entry.step > step:
                following = entry
                break
            last = entry
        if following is None or not following.linear:
            return last.weight
        passed = (step - last.step) / (following.step - last.step)
        return last.weight + (following.weight - last.weight) * passed

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the entries."""
        return tuple(entry.step for entry in self.entries)

    def to_json(self) -> list[dict[str, Any]]:
        return [entry.to_json() for entry in self.entries]

    def __str__(self) -> str:
        """Such as ``4, 1 from step 1000, linearly to 0 at step 2000``."""
        later = (
            f"linearly to {entry.weight:g} at step {entry.step}"
            if entry.linear
            else f"{entry.weight:g} from step {entry.step}"
            for entry in self.entries[1:]
        )
        return ", ".join((f"{self.entries[0].weight:g}", *later))
