"""What is known of a request while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from echo4o.generate.context import Context
from echo4o.generate.request import Request


@dataclass
class State:
    """Contexts, sizes and results of one request.

    Attributes:
        full, no_text, no_image: contexts of the three guidance branches.
        sizes: (height, width) of the resized references.
        text: its thought or answer.
        x: (h · w, p·p·C) latent tokens being drawn; grid: (rows, columns) of them.
    """

    request: Request
    generator: Generator
    full: Context = field(default_factory=Context)
    no_text: Context = field(default_factory=Context)
    no_image: Context = field(default_factory=Context)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    grid: tuple[int, int] = (0, 0)
