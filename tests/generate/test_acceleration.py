"""Forecasts against the reference's recipe, kept for a whole run; nothing of them is left for the next run."""

from __future__ import annotations

from math import factorial

import pytest
import torch
from torch import Tensor

from echo4o.generate.acceleration import TaylorSeer
from echo4o.generate.context import Reader
from echo4o.generate.pipeline import Echo4oPipeline
from tests.generate.test_pipeline import PROMPT, picture
from tests.train.tiny_run import write_bagel


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Echo4oPipeline:
    folder = write_bagel(tmp_path_factory.mktemp("model") / "tiny")
    return Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture
def two():
    return [picture(1), picture(2, 48, 64)]


class Recipe:
    """The reference's bookkeeping for one feature: a dictionary of coefficients and a list of computed steps."""

    def __init__(self) -> None:
        self.coefficients: dict[int, Tensor] = {}
        self.step, self.full_steps = 0, []

    def __call__(self, compute) -> Tensor:
        step = self.step
        self.step += 1
        due = step < 5 or step - self.full_steps[-1] == 3
        if not due:
            x = step - self.full_steps[-1]
            return sum(d * x**k / factorial(k) for k, d in self.coefficients.items())
        feature = compute()
        self.full_steps.append(step)
        updated = {0: feature}
        for k in range(6):
            if k in self.coefficients and step > 3:
                distance = self.full_steps[-1] - self.full_steps[-2]
                updated[k + 1] = (updated[k] - self.coefficients[k]) / distance
        self.coefficients = updated
        return feature


@pytest.mark.parametrize(("evaluations", "computed"), [(49, 19), (41, 17), (3, 3)])
def test_schedule(evaluations: int, computed: int) -> None:
    seer, full = TaylorSeer(), []
    for step in range(evaluations):
        if seer.is_due:
            full.append(step)
            seer.computed(torch.zeros(1))
        else:
            seer.forecast()
    assert len(full) == computed
    assert full == [step for step in range(evaluations) if step < 5 or step % 3 == 1]


def test_forecasts_follow_the_recipe() -> None:
    seer, recipe = TaylorSeer(), Recipe()
    generator = torch.Generator().manual_seed(0)
    for _ in range(49):
        feature = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        expected = recipe(lambda value=feature: value)
        actual = seer.computed(feature) if seer.is_due else seer.forecast()
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert len(seer.differences) == len(recipe.coefficients) == 7


def test_a_smooth_feature_is_forecast_closely() -> None:
    seer, apart = TaylorSeer(), []
    for step in range(49):
        feature = torch.tensor([1.0, step / 49], dtype=torch.float64).cumsum(0)
        if seer.is_due:
            seer.computed(feature)
        else:
            apart.append((seer.forecast() - feature).abs().max())
    assert max(apart) < 1e-12  # linear in the step: order 1 is exact


def count_rows(monkeypatch) -> list[int]:
    """Branches of every forward pass of the drawing."""
    branches: list[int] = []
    features = Reader.features
    monkeypatch.setattr(
        Reader, "features", lambda self, p, *a: (branches.append(len(p.pieces)), features(self, p, *a))[1]
    )
    return branches


def test_a_run_with_forecasts(pipe: Echo4oPipeline, two, monkeypatch) -> None:
    """All three branches forecast with counters of their own; the image-free one only where guidance acts."""
    settings = {"num_timesteps": 20, "cfg_interval": (0.4, 1.0), "cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
    branches = count_rows(monkeypatch)
    exact = pipe(PROMPT, two, **settings)
    evaluations = sum(branches)
    branches.clear()
    fast = pipe(PROMPT, two, taylorseer=True, **settings)
    assert sum(branches) < 0.55 * evaluations
    assert (fast.info[0]["latents"] - exact.info[0]["latents"]).abs().max() > 0

    # The same run with every branch computed in every step, and what the recipe makes of it in its place.
    recipes: dict[int, tuple[TaylorSeer, Recipe]] = {}

    def by_recipe(self: TaylorSeer, feature: Tensor) -> Tensor:
        return recipes.setdefault(id(self), (self, Recipe()))[1](lambda: feature)

    monkeypatch.setattr(TaylorSeer, "is_due", property(lambda self: True))
    monkeypatch.setattr(TaylorSeer, "computed", by_recipe)
    slow = pipe(PROMPT, two, taylorseer=True, **settings)
    torch.testing.assert_close(slow.info[0]["latents"], fast.info[0]["latents"], atol=1e-4, rtol=1e-4)
    steps = sorted(recipe.step for _, recipe in recipes.values())
    assert steps[0] == steps[1] < steps[2] == 19


def test_nothing_is_left_for_the_next_run(pipe: Echo4oPipeline, two) -> None:
    before = pipe(PROMPT, two, num_timesteps=9)
    pipe(PROMPT, two, num_timesteps=9, taylorseer=True)
    after = pipe(PROMPT, two, num_timesteps=9)
    assert torch.equal(before.info[0]["latents"], after.info[0]["latents"])


def test_guidance_differences_are_used_again(pipe: Echo4oPipeline, two, monkeypatch) -> None:
    branches = count_rows(monkeypatch)
    exact = pipe(PROMPT, two, num_timesteps=9)
    branches.clear()
    cached = pipe(PROMPT, two, num_timesteps=9, branch_cache=2)
    assert branches == [3, 1, 3, 1, 3, 1, 3, 1]
    latents = [out.info[0]["latents"] for out in (cached, exact)]
    assert 0 < ((latents[0] - latents[1]).norm() / latents[1].norm()).item() < 0.2
    branches.clear()
    pipe(PROMPT, two, num_timesteps=20, branch_cache=3, taylorseer=True)
    # The full branch follows the forecasts' schedule; the others are due in every third step, five times at first.
    assert branches[:5] == [3, 1, 1, 3, 1] and sum(branches) == 19


def test_forecasts_in_a_batch_equal_those_alone(pipe: Echo4oPipeline, two) -> None:
    requests = [
        pipe.prompt_request(PROMPT, two[: 1 + seed % 2], seed=seed, num_timesteps=9 + seed, taylorseer=seed != 1)
        for seed in range(3)
    ]
    together = pipe.batch(requests)
    for number, request in enumerate(requests):
        alone = pipe.batch([request]).info[0]["latents"]
        torch.testing.assert_close(together.info[number]["latents"], alone, atol=1e-4, rtol=1e-4)
