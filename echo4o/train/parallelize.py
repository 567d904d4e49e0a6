"""Activation checkpointing and per-block compilation, applied from outside: the model file knows nothing of them.

Order: checkpointing → compile → (sharding, in the engines). Parameter names never change.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from echo4o.model import Bagel

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
)


def blocks(model: Bagel) -> Iterator[nn.Module]:
    """The decoder layers and, where there is one, the ViT's layers: the units of recomputation and compilation."""
    yield from model.language_model.model.layers
    if model.config.visual_und:
        yield from model.vit_model.vision_model.encoder.layers


def apply_activation_checkpointing(model: Bagel, mode: str) -> None:
    """Recompute blocks in the backward pass.

    Args:
        mode: ``none``; ``full`` keeps only each block's input; ``selective`` also keeps attention outputs and every
            second matrix product, the dearest things to recompute.

    Raises:
        ValueError: for another mode.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"unknown activation_checkpointing {mode!r}; known: {', '.join(ACTIVATION_CHECKPOINTING)}")
    if mode == "none":
        return
    for block in blocks(model):
        # Patched, not wrapped: a wrapper module would put its name into every parameter's.
        block.forward = _recomputed(block.forward, selective=mode == "selective")


def compile_blocks(model: Bagel) -> None:
    """torch.compile each decoder and ViT layer on its own: one graph serves all layers."""
    for block in blocks(model):
        block.compile(dynamic=True)


def _recomputed(forward, selective: bool):
    # The blocks draw no random numbers, so there is no generator state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _selective_contexts

    @functools.wraps(forward)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _selective_contexts():
    """A fresh pair of contexts for one call: the count of matrix products starts anew."""
    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default}
    saved = {getattr(aten, name).default for name in _ATTENTION if hasattr(aten, name)}
    saved |= {torch.ops.higher_order.flex_attention}
    num_products: Counter[bool] = Counter()

    def policy(ctx, operation, *args, **kwargs) -> CheckpointPolicy:
        if operation in products:
            num_products[ctx.is_recompute] += 1
            keep = num_products[ctx.is_recompute] % 2 == 1
        else:
            keep = operation in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
