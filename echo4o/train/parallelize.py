"""Activation checkpointing, per-block compilation and sharding, applied from outside: the model knows nothing of them.

Order: checkpointing → compile → sharding. Parameter names never change.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from echo4o.model import Bagel

#: What drawing calls on the model besides its forward pass: weights are gathered for these too.
DRAWING_METHODS = ("hidden_states", "latent_features", "velocity")
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


def apply_activation_checkpointing(model: Bagel, mode: str, draws_random_numbers: bool = False) -> None:
    """Recompute blocks in the backward pass.

    Args:
        mode: ``none``; ``full`` keeps only each block's input; ``selective`` also keeps attention outputs and every
            second matrix product, the dearest things to recompute.
        draws_random_numbers: blocks have dropout (in LoRA adapters), whose generator is restored for recomputation.

    Raises:
        ValueError: for another mode.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"unknown activation_checkpointing {mode!r}; known: {', '.join(ACTIVATION_CHECKPOINTING)}")
    if mode == "none":
        return
    for block in blocks(model):
        # Patched, not wrapped: a wrapper module would put its name into every parameter's.
        block.forward = _recomputed(block.forward, mode == "selective", draws_random_numbers)


def compile_blocks(model: Bagel) -> None:
    """torch.compile each decoder and ViT layer on its own: one graph serves all layers."""
    for block in blocks(model):
        block.compile(dynamic=True)


def shard(
    model: Bagel,
    mesh: DeviceMesh,
    mixed_precision: MixedPrecisionPolicy,
    *,
    reshard_after_forward: bool = True,
    offload_policy: OffloadPolicy | None = None,
    prefetch: bool = True,
) -> None:
    """Shard every decoder layer, ViT layer, the embeddings and the head by rows; what is left goes with the model.

    A decoder layer with both of its experts is one unit: apart, each expert would be gathered a third time when the
    layer is recomputed. Called on the meta device or on a model with its values.

    Args:
        mesh: 1-D (shards), or 2-D (replicas, shards).
        prefetch: False gathers a block's weights only when its backward pass begins.
    """
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload_policy or OffloadPolicy()}
    units: list[nn.Module] = list(blocks(model))
    if not model.config.llm.tie_word_embeddings:
        # A tied table serves as both: it stays with the model, gathered once for the whole step.
        units += [model.language_model.model.embed_tokens, model.language_model.lm_head]
    for unit in units:
        fully_shard(unit, mp_policy=mixed_precision, reshard_after_forward=reshard_after_forward, **options)
    # Latents and noise stay in float32: only the root is given them, and it must not cast them.
    root_precision = MixedPrecisionPolicy(
        param_dtype=mixed_precision.param_dtype,
        reduce_dtype=mixed_precision.reduce_dtype,
        cast_forward_inputs=False,
    )
    fully_shard(model, mp_policy=root_precision, reshard_after_forward=False, **options)
    for name in DRAWING_METHODS:
        register_fsdp_forward_method(model, name)
    if not prefetch:
        for unit in units:
            assert isinstance(unit, FSDPModule)
            unit.set_modules_to_backward_prefetch([unit])  # itself, which is there already: nothing ahead of time


def _recomputed(forward, selective: bool, draws_random_numbers: bool):
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers}
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
