"""Images from noise: the denoising steps of all requests, all guidance branches of a step in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echo4o.generate.acceleration import BranchCache, TaylorSeer
from echo4o.generate.context import Addition, Context, LatentImage, Pass, Reader
from echo4o.generate.sampler import shifted_schedule
from echo4o.generate.state import State

OnStep = Callable[[int, int], object]
"""Called after every denoising step with the steps done and their number."""


@dataclass
class _Drawing:
    """One picture on its way: its times, and what is remembered of its branches between steps."""

    state: State
    times: Tensor
    forecasts: dict[Context, TaylorSeer] = field(default_factory=dict)
    differences: dict[Context, BranchCache] = field(default_factory=dict)

    def branches(self, number: int) -> list[Context]:
        """Contexts whose velocity is wanted at a step, the full one first; one that equals another is not repeated."""
        state = self.state
        no_text, no_image = state.request.settings.guidance.branches_at(float(self.times[number]))
        wanted = [state.full, *([state.no_text] if no_text else []), *([state.no_image] if no_image else [])]
        return list(dict.fromkeys(wanted))

    def forecast(self, context: Context) -> TaylorSeer | None:
        if not self.state.request.settings.taylorseer:
            return None
        return self.forecasts.setdefault(context, TaylorSeer())

    def difference(self, context: Context) -> BranchCache | None:
        every = self.state.request.settings.branch_cache
        if every == 1 or context == self.state.full:
            return None
        return self.differences.setdefault(context, BranchCache(every))

    def advance(self, number: int, velocities: dict[Context, Tensor]) -> None:
        """One Euler step: x ← x − v · (t − t')."""
        state, t = self.state, self.times[number]
        full, no_text, no_image = (velocities.get(c) for c in (state.full, state.no_text, state.no_image))
        assert full is not None
        velocity = state.request.settings.guidance.combine(float(t), full, no_text, no_image)
        state.x = state.x - velocity * (t - self.times[number + 1]).to(velocity.device)


def draw(reader: Reader, states: Sequence[State], on_step: OnStep | None = None) -> None:
    """Images of all states from noise; `state.grid` is given, `state.x` holds the latent tokens in the end."""
    drawings = []
    for state in states:
        settings = state.request.settings
        shape = (state.grid[0] * state.grid[1], reader.model.config.latent_dim)
        noise = state.request.noise
        if noise is not None and tuple(noise.shape) != shape:
            raise ValueError(f"noise must be {shape} for this output, not {tuple(noise.shape)}")
        noise = torch.randn(shape, generator=state.generator) if noise is None else noise
        state.x = noise.to(reader.model.device)
        drawings.append(_Drawing(state, shifted_schedule(settings.num_timesteps, settings.timestep_shift)))
    total = max((len(drawing.times) - 1 for drawing in drawings), default=0)
    layouts: dict[tuple, Pass] = {}  # of the passes so far: positions and attention are the same in every step
    for number in range(total):
        active = [drawing for drawing in drawings if number + 1 < len(drawing.times)]
        _step(reader, active, number, layouts)
        if on_step is not None:
            on_step(number + 1, total)


def _step(reader: Reader, active: Sequence[_Drawing], number: int, layouts: dict[tuple, Pass]) -> None:
    """One step of every image. Branches that are computed, of all requests, share forward passes."""
    velocities: list[dict[Context, Tensor]] = [{} for _ in active]
    features: dict[tuple[int, Context], Tensor] = {}
    computed: list[tuple[int, Context]] = []
    for place, drawing in enumerate(active):
        for context in drawing.branches(number):
            difference, forecast = drawing.difference(context), drawing.forecast(context)
            if difference is not None and not difference.is_due:
                continue  # from the full branch's, below
            if forecast is not None and not forecast.is_due:
                features[place, context] = forecast.forecast()
            else:
                computed.append((place, context))
    for key, result in zip(computed, _compute(reader, active, number, computed, layouts), strict=True):
        forecast = active[key[0]].forecast(key[1])
        features[key] = result if forecast is None else forecast.computed(result)

    if features:
        rows = reader.model.velocity(torch.cat(list(features.values())))
        for (place, context), velocity in zip(features, rows.split([len(f) for f in features.values()]), strict=True):
            velocities[place][context] = velocity
    for place, drawing in enumerate(active):
        full = velocities[place][drawing.state.full]
        for context in drawing.branches(number):
            difference = drawing.difference(context)
            if difference is not None:
                velocities[place][context] = difference.velocity(full, velocities[place].get(context))
        drawing.advance(number, velocities[place])


def _compute(
    reader: Reader,
    active: Sequence[_Drawing],
    number: int,
    wanted: Sequence[tuple[int, Context]],
    layouts: dict[tuple, Pass],
) -> list[Tensor]:
    """The last layer's output (h · w, hidden) of the wanted branches, in as few forward passes as they fit into."""
    additions, images = [], []
    for place, context in wanted:
        state, t = active[place].state, active[place].times[number]
        images.append(LatentImage(state.x, state.grid, float(t)))
        additions.append(Addition(context, images[-1]))
    results: list[Tensor] = []
    for chunk in reader.chunks(additions):
        drawn = images[len(results) : len(results) + len(chunk)]
        key = tuple((addition.after, image.grid) for addition, image in zip(chunk, drawn, strict=True))
        if key not in layouts:
            layouts[key] = reader.plan(chunk)
        latents = torch.cat([image.tokens for image in drawn])
        times = torch.tensor([image.time for image in drawn], device=latents.device)
        results += reader.features(layouts[key], latents, times)
    return results
