"""What is asked of the pipeline, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from echo4o.generate.presets import Settings

ImageLike = Image.Image | str | Path | bytes


@dataclass(frozen=True)
class Request:
    """One request: texts and images in any order, and what is wanted of them.

    Attributes:
        elements: texts (strings) and images (PIL images, `Path`s or file bytes), read in order.
        height, width: of the output; by default that of the reference `settings.size_from`, 1024² without references.
        think: let the model plan in words first.
        understand: answer in text instead of drawing.
        seed: of all noise of this request, whatever else is in the batch.
        noise: (h · w, p·p·C) initial noise, and noise of the references' posteriors, instead of the seed's.
    """

    elements: tuple[str | ImageLike, ...]
    settings: Settings = field(default_factory=Settings)
    height: int | None = None
    width: int | None = None
    think: bool = False
    understand: bool = False
    seed: int = 0
    noise: Tensor | None = None
    reference_noise: tuple[Tensor, ...] | None = None


@dataclass
class Output:
    """What came of the requests.

    Attributes:
        images: drawn, in order of the requests that draw.
        texts: thoughts and answers, in order of the requests that have one.
        info: one dictionary a request: ``seed``, ``height`` and ``width`` (None if nothing is drawn), ``image`` (its
            place in `images`, or None), ``text`` ("" if there is none), ``settings``, ``context_tokens`` of the three
            guidance contexts, ``latents`` (h · w, p·p·C).
    """

    images: list[Image.Image]
    texts: list[str]
    info: list[dict[str, Any]]


def sized_as_read(settings: Settings, order: Sequence[int]) -> Settings:
    """``size_from`` N means image N; a request counts its images as they are read.

    Args:
        order: numbers (from 0) of the images, in the order they are read.
    """
    number = settings.size_from
    if not isinstance(number, int) or number - 1 not in order:
        return settings
    return replace(settings, size_from=list(order).index(number - 1) + 1)
