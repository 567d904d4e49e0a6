"""A model's layers, which are nearly all of its weights, apart from all the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from echo4o.model import Bagel


def layers_of(model: Bagel) -> dict[str, nn.Module]:
    """Decoder layers, which every step needs, then those of the vision tower, by their names."""
    stacks = {"language_model.model.layers": model.language_model.model.layers}
    if hasattr(model, "vit_model"):
        stacks["vit_model.vision_model.encoder.layers"] = model.vit_model.vision_model.encoder.layers
    return {f"{name}.{i}": layer for name, layers in stacks.items() for i, layer in enumerate(layers)}


@contextmanager
def without_layers(model: Bagel) -> Iterator[None]:
    """The model as if it had no layers, for what concerns all the rest."""
    owners: list[nn.Module] = [model.language_model.model]
    if hasattr(model, "vit_model"):
        owners.append(model.vit_model.vision_model.encoder)
    stacks = [owner.layers for owner in owners]
    for owner in owners:
        owner.layers = nn.ModuleList()
    try:
        yield
    finally:
        for owner, stack in zip(owners, stacks, strict=True):
            owner.layers = stack


def num_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers; of quantised ones, what they really take."""
    return sum(_tensor_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def is_quantized(module: nn.Module) -> bool:
    return any(_is_composite(tensor) for tensor in module.parameters())


def _is_composite(tensor: Any) -> bool:
    """Whether a tensor is made of others: integers and their scales."""
    return hasattr(tensor, "__tensor_flatten__")


def _tensor_bytes(tensor: Any) -> int:
    if _is_composite(tensor):
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class LoadingError(ValueError):
    """A way of loading that is unknown or impossible here; the message has the remedy."""
