"""One fixed, tiny forward pass: the same model gives the same numbers, wherever it was loaded from."""

from __future__ import annotations

import torch
from torch import Tensor

from echo4o.model import Bagel, BagelConfig
from echo4o.packed import PackedBatch

_NUM_TEXT = 6
_PRIME = 7919


def probe_batch(config: BagelConfig) -> PackedBatch:
    """Some words, an image for the ViT and one to draw, as far as the model has them; with a loss on each head."""
    text_ids = (torch.arange(_NUM_TEXT) * _PRIME + 5) % config.llm.vocab_size
    lengths, modes, positions = [_NUM_TEXT], ["causal"], [torch.arange(_NUM_TEXT)]
    fields = {}
    if config.visual_und and config.vit:
        side = min(2, config.vit_max_num_patch_per_side)
        pixels = config.vit.num_channels * config.vit.patch_size**2
        at, count = sum(lengths), side * side
        fields |= {
            "packed_vit_tokens": _wave(count, pixels).clamp(-1, 1),
            "packed_vit_token_indexes": torch.arange(at, at + count),
            "packed_vit_position_ids": _grid(side, config.vit_max_num_patch_per_side),
            "vit_token_seqlens": [count],
        }
        _append(lengths, modes, positions, count, "full")
    if config.visual_gen:
        side = min(2, config.max_latent_size)
        at, count = sum(lengths), side * side
        fields |= {
            "packed_vae_token_indexes": torch.arange(at, at + count),
            "packed_latent_position_ids": _grid(side, config.max_latent_size),
            "packed_timesteps": torch.full((count,), 0.3),
            "patchified_vae_latent_shapes": [(side, side)],
            "mse_loss_indexes": torch.arange(at, at + count),
        }
        _append(lengths, modes, positions, count, "noise")
    return PackedBatch(
        sequence_length=sum(lengths),
        sample_lens=[sum(lengths)],
        split_lens=lengths,
        attn_modes=modes,
        packed_text_ids=text_ids,
        packed_text_indexes=torch.arange(_NUM_TEXT),
        packed_position_ids=torch.cat(positions),
        ce_loss_indexes=torch.arange(_NUM_TEXT - 1),
        packed_label_ids=text_ids[1:],
        ce_loss_weights=torch.ones(_NUM_TEXT - 1),
        **fields,
    )


@torch.no_grad()
def probe_outputs(model: Bagel) -> dict[str, Tensor]:
    """What the model makes of `probe_batch`: float32 CPU tensors, the same for the same weights, dtype and device.

    Returns:
        ``ce`` (n_ce,), ``last_hidden_state`` (sequence_length, hidden) and, of models that draw, ``mse``
        (n_mse, p·p·C).
    """
    batch = probe_batch(model.config).to(model.device)
    count = 0 if batch.packed_vae_token_indexes is None else len(batch.packed_vae_token_indexes)
    latents = _wave(count, model.config.latent_dim).to(model.device) if count else None
    noise = latents.flip(0).neg() if latents is not None else None
    was_training = model.training
    try:
        output = model.eval()(batch, latents, noise)
    finally:
        model.train(was_training)
    found = {"ce": output.ce, "mse": output.mse, "last_hidden_state": output.last_hidden_state}
    return {name: tensor.float().cpu() for name, tensor in found.items() if tensor is not None}


def _append(lengths: list[int], modes: list[str], positions: list[Tensor], count: int, mode: str) -> None:
    """An image: all of its tokens share one position."""
    positions.append(torch.full((count,), int(positions[-1][-1]) + 1))
    lengths.append(count)
    modes.append(mode)


def _grid(side: int, columns: int) -> Tensor:
    steps = torch.arange(side)
    return (steps[:, None] * columns + steps).flatten()


def _wave(rows: int, columns: int) -> Tensor:
    """(rows, columns) numbers about as large as noise, without a random generator."""
    return 1.4 * torch.sin(torch.arange(rows * columns, dtype=torch.float64) * 1.7 + 0.3).float().reshape(rows, columns)
