"""Everything that turns positions, time and latents into hidden vectors and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str):
    """The activation function of a config entry.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def sincos_2d(dim: int, side: int) -> Tensor:
    """(side², dim) float32 table; row r · side + c holds column c in the first half of the channels, row r in the rest.

    The 2-D sin-cos embedding of MAE (He et al., 2021), as DiT and BAGEL use it.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()


class PositionTable(nn.Module):
    """Fixed 2-D sin-cos table, looked up by position id (row · side + column). Never trained."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, dim), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.pos_embed.copy_(sincos_2d(self.pos_embed.shape[1], self.side))

    def forward(self, position_ids: Tensor) -> Tensor:
        return F.embedding(position_ids, self.pos_embed)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the raw time t in [0, 1] (cosines first, period base 10000), then a two-layer MLP (DiT)."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """t (n,) → (n, hidden)."""
        half = self.frequency_size // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class Connector(nn.Module):
    """Two-layer MLP from ViT features to the language model."""

    def __init__(self, in_features: int, hidden_size: int, act: str) -> None:
        super().__init__()
        self.act = activation(act)
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def shift_time(logits: Tensor, shift: float) -> Tensor:
    """Time in [0, 1] from logits: sigmoid, then s·t / (1 + (s − 1)·t). A logit of −∞ is exactly 0 (clean)."""
    t = logits.sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def patchify_latents(latents: Sequence[Tensor], patch: int) -> Tensor:
    """Latents (C, H, W) of any sizes → (n, patch² · C) tokens in order (row in patch, column in patch, channel)."""
    tokens = []
    for latent in latents:
        channels, height, width = latent.shape
        h, w = height // patch, width // patch
        grid = latent[:, : h * patch, : w * patch].reshape(channels, h, patch, w, patch)
        tokens.append(grid.permute(1, 3, 2, 4, 0).reshape(h * w, patch * patch * channels))
    return torch.cat(tokens)


def unpatchify_latents(tokens: Tensor, shapes: Sequence[tuple[int, int]], patch: int) -> list[Tensor]:
    """Inverse of `patchify_latents`: tokens (n, patch² · C) of grids (h, w) → latents (C, h · patch, w · patch)."""
    latents = []
    for (h, w), part in zip(shapes, tokens.split([h * w for h, w in shapes]), strict=True):
        grid = part.reshape(h, w, patch, patch, -1).permute(4, 0, 2, 1, 3)
        latents.append(grid.reshape(grid.shape[0], h * patch, w * patch))
    return latents
