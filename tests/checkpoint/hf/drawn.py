"""A picture of fixed noise, prompt and reference."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from echo4o.generate.pipeline import Echo4oPipeline


def drawn_picture(pipe: Echo4oPipeline) -> Tensor | None:
    """(H, W, 3) uint8; None of a model that does not draw."""
    if not pipe.model.config.visual_gen:
        return None
    row, column = np.mgrid[:32, :32]
    pixels = np.stack([row * 8, column * 8, row * 0 + 90], axis=-1).astype(np.uint8)
    result = pipe("a b", [Image.fromarray(pixels)], height=32, width=32, num_timesteps=3, seed=5)
    return torch.from_numpy(np.array(result.images[0]))
