"""The sampler as pure functions: time grid and guidance. Formulas as upstream; the velocity predicts noise − data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RENORM_TYPES = ("global", "channel", "text_channel")
_EPSILON = 1e-8


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with two scales.

    Attributes:
        cfg_text_scale: a: away from the answer without the text; 1 or less turns all guidance off.
        cfg_img_scale: b: away from the answer without the images; 1 or less turns it off.
        cfg_interval: (lo, hi): guidance acts where lo < t ≤ hi, t being the shifted time.
        cfg_renorm_type: how the guided velocity is brought back to the norm of the unguided one.
        cfg_renorm_min: smallest factor of that; 1 turns it off.

    Raises:
        ValueError: for an unknown renorm type or an impossible interval.
    """

    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 2.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_renorm_type: str = "text_channel"
    cfg_renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in RENORM_TYPES:
            raise ValueError(
                f"unknown cfg_renorm_type {self.cfg_renorm_type!r}; choose one of {', '.join(RENORM_TYPES)}"
            )
        for name in ("cfg_text_scale", "cfg_img_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval {self.cfg_interval} must be two times with 0 ≤ low ≤ high ≤ 1")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min {self.cfg_renorm_min} must lie between 0 and 1")

    def scales_at(self, t: float) -> tuple[float, float]:
        """(text, image) scales at shifted time t."""
        # Upstream compares float32 times: at a tie in double precision the limits would be others.
        low, high = (float(torch.tensor(limit, dtype=torch.float32)) for limit in self.cfg_interval)
        return (self.cfg_text_scale, self.cfg_img_scale) if low < t <= high else (1.0, 1.0)

    def branches_at(self, t: float) -> tuple[bool, bool]:
        """Whether the answers without text and without images are needed at time t."""
        text_scale, image_scale = self.scales_at(t)
        return text_scale > 1, text_scale > 1 and image_scale > 1

    @property
    def num_branches(self) -> int:
        """Evaluations of a guided step."""
        return 1 + (self.cfg_text_scale > 1) + (self.cfg_text_scale > 1 and self.cfg_img_scale > 1)

    def combine(self, t: float, full: Tensor, no_text: Tensor | None, no_image: Tensor | None) -> Tensor:
        """Guided velocity from those of the branches, each (n, p·p·C) of one image."""
        text_scale, image_scale = self.scales_at(t)
        if no_text is None or text_scale <= 1:
            return full
        guided = no_text + text_scale * (full - no_text)
        if self.cfg_renorm_type == "text_channel":
            guided = guided * self._factor(full, guided, per_token=True)
        if no_image is not None and image_scale > 1:
            guided = no_image + image_scale * (guided - no_image)
        if self.cfg_renorm_type != "text_channel":
            guided = guided * self._factor(full, guided, per_token=self.cfg_renorm_type == "channel")
        return guided

    def _factor(self, full: Tensor, guided: Tensor, per_token: bool) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return x.norm(dim=-1, keepdim=True) if per_token else x.norm()

        return (norm(full) / (norm(guided) + _EPSILON)).clamp(min=self.cfg_renorm_min, max=1.0)


def shifted_schedule(num_timesteps: int, timestep_shift: float) -> Tensor:
    """(num_timesteps,) float32 times from 1 to 0: a uniform grid τ moved to s·τ / (1 + (s − 1)·τ).

    Raises:
        ValueError: for fewer than two points or a shift that is not positive.
    """
    if num_timesteps < 2 or timestep_shift <= 0:
        raise ValueError(
            f"num_timesteps is {num_timesteps} and timestep_shift {timestep_shift}; they must be at least 2 and above 0"
        )
    grid = torch.linspace(1, 0, num_timesteps)
    return timestep_shift * grid / (1 + (timestep_shift - 1) * grid)
