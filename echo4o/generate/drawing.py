"""Images from noise: the denoising steps of all requests, all guidance branches of a step in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from echo4o.generate.context import Addition, Context, LatentImage, Reader
from echo4o.generate.sampler import shifted_schedule
from echo4o.generate.state import State


def draw(reader: Reader, states: Sequence[State]) -> None:
    """Images of all states from noise; `state.grid` is given, `state.x` holds the latent tokens in the end."""
    schedules = []
    for state in states:
        settings = state.request.settings
        shape = (state.grid[0] * state.grid[1], reader.model.config.latent_dim)
        noise = state.request.noise
        if noise is not None and tuple(noise.shape) != shape:
            raise ValueError(f"noise must be {shape} for this output, not {tuple(noise.shape)}")
        noise = torch.randn(shape, generator=state.generator) if noise is None else noise
        state.x = noise.to(reader.model.device)
        times = shifted_schedule(settings.num_timesteps, settings.timestep_shift)
        schedules.append(list(pairwise(times.unbind())))
    for number in range(max(map(len, schedules), default=0)):
        active = [(s, *steps[number]) for s, steps in zip(states, schedules, strict=True) if number < len(steps)]
        _step(reader, active)


def _step(reader: Reader, active: Sequence[tuple[State, Tensor, Tensor]]) -> None:
    """One Euler step of every image: all needed branches of all requests in one forward pass."""
    additions: list[Addition] = []
    places: list[list[int | None]] = []
    for state, t, _ in active:
        wanted = (True, *state.request.settings.guidance.branches_at(float(t)))
        chosen: dict[Context, int] = {}  # a branch that equals another is not computed
        branches: list[int | None] = []
        for context, is_wanted in zip((state.full, state.no_text, state.no_image), wanted, strict=True):
            if not is_wanted:
                branches.append(None)
                continue
            if context not in chosen:
                chosen[context] = len(additions)
                additions.append(Addition(context, LatentImage(state.x, state.grid, float(t))))
            branches.append(chosen[context])
        places.append(branches)
    velocities = reader.velocities(additions)
    for (state, t, t_next), branches in zip(active, places, strict=True):
        full, *others = (None if place is None else velocities[place] for place in branches)
        assert full is not None
        velocity = state.request.settings.guidance.combine(float(t), full, *others)
        state.x = state.x - velocity * (t - t_next).to(velocity.device)
