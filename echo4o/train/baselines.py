"""What a model must beat: the error of taking a reference for the target."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from echo4o.model.embeddings import patchify_latents, unpatchify_latents
from echo4o.packed import PackedBatch


def copy_errors(batch: PackedBatch, latents: Tensor, noised: Tensor, patch: int) -> list[tuple[int, float]]:
    """How far each target is from the nearest of its references.

    References are the clean images that a sample lays down before the target, resized (bilinearly, as latents) to the
    target's grid. Targets without any are left out.

    Args:
        latents: (n_vae, p·p·C) of all VAE images of the pack.
        noised: (n_vae,) bool, which of them are targets.
        patch: latent pixels a side of a token.

    Returns:
        (tokens, squared error summed over them, each a mean over its channels) of the target, by target.
    """
    grids = batch.patchified_vae_latent_shapes or []
    assert batch.packed_vae_token_indexes is not None
    starts = list(accumulate((h * w for h, w in grids), initial=0))[:-1]
    ends = torch.tensor(list(accumulate(batch.sample_lens)))
    firsts = batch.packed_vae_token_indexes.cpu()[starts]
    samples = torch.searchsorted(ends, firsts, right=True).tolist()
    is_target = noised.cpu()[starts].tolist()
    images = unpatchify_latents(latents.float(), grids, patch)
    errors = []
    for number, (h, w) in enumerate(grids):
        references = [i for i in range(number) if samples[i] == samples[number] and not is_target[i]]
        if not is_target[number] or not references:
            continue
        target = images[number]
        distances = [_squared_distance(images[i], target, patch) for i in references]
        errors.append((h * w, float(torch.stack(distances).min())))
    return errors


def _squared_distance(reference: Tensor, target: Tensor, patch: int) -> Tensor:
    if reference.shape != target.shape:
        reference = F.interpolate(reference[None], size=target.shape[1:], mode="bilinear", align_corners=False)[0]
    return patchify_latents([reference - target], patch).double().square().mean(dim=-1).sum()
