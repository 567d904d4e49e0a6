"""Layers with their weights in fewer bits, through torchao; activations keep their dtype."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import sys

import torch
from torch import Tensor, nn

from echo4o.generate.layers import LoadingError, layers_of
from echo4o.model import Bagel

KINDS = ("int8", "nf4")


def check_kind(kind: str | None) -> None:
    """Refuse before any long work.

    Raises:
        LoadingError: for an unknown kind, or if torchao is not installed.
    """
    if kind not in (None, *KINDS):
        raise LoadingError(f"quantize is {kind!r}; choose one of {', '.join(KINDS)}")
    if kind is not None and importlib.util.find_spec("torchao") is None:
        raise LoadingError("quantize needs torchao: pip install 'echo4o[quantize]'")


def quantize(model: Bagel, kind: str, device: torch.device | str | None = None) -> None:
    """Keep the weights of all linear layers in the decoder layers (both experts) and the vision tower's in fewer bits.

    They are expanded whenever they are used. One weight at a time is replaced, so that two forms of the whole model
    never exist side by side.

    Args:
        kind: ``int8`` (symmetric, a scale per output channel) or ``nf4`` (QLoRA's 4-bit NormalFloat, a scale per 64
            weights, these scales in 8 bits).
        device: move every layer there before its weights are replaced, which is faster on a GPU. The rest of the model
            stays where it is.

    Raises:
        LoadingError: for an unknown kind, or if torchao is not installed.
    """
    check_kind(kind)
    for layer in layers_of(model).values():
        if device is not None:
            layer.to(device)
        quantize_layer(layer, kind)


def quantize_layer(layer: nn.Module, kind: str) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            weight = _QUANTIZED[kind](module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            _return_freed_memory()


def _return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MB, which would add up to the whole model as it was."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _int8(weight: Tensor) -> Tensor:
    # Not torchao's quantize_, whose settings for the compiler would change the precision of all matrix products.
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, granularity=PerRow())


def _nf4(weight: Tensor) -> Tensor:
    from torchao.quantization import to_nf4

    # The vision tower of BAGEL-7B-MoT has a size that blocks of 256 · 64 do not divide.
    block_size = math.gcd(weight.numel(), 64)
    return to_nf4(weight, block_size, math.gcd(weight.numel() // block_size, 256))


_QUANTIZED = {"int8": _int8, "nf4": _nf4}
