"""Images of a batch to latent tokens and flow noise, both determined by the image's own seed."""

from __future__ import annotations

import torch
from torch import Tensor

from echo4o.model.embeddings import patchify_latents
from echo4o.model.vae import AutoEncoder
from echo4o.packed import PackedBatch


@torch.no_grad()
def encode_batch(vae: AutoEncoder, batch: PackedBatch, latent_patch_size: int) -> tuple[Tensor | None, Tensor | None]:
    """Latent tokens and flow noise of every laid-down VAE image, in the order of ``packed_vae_token_indexes``.

    A distinct image passes the encoder once, however often it is laid down, and by itself: in a batch the last bits of
    its moments would depend on the other images. One that a cache holds does not pass it at all. Noise is drawn on the
    CPU in float32 from the image's seed (first the posterior sample, then the flow noise): neighbours, ranks and
    devices change nothing.

    Returns:
        Two float32 tensors (n_vae, patch² · C) on the batch's device, or two None for a batch without VAE images.

    Raises:
        ValueError: if the batch has latent tokens but no images.
    """
    if batch.packed_vae_token_indexes is None or not len(batch.packed_vae_token_indexes):
        return None, None
    images, cached = batch.vae_images or [], batch.vae_moments or []
    if not (images or cached) or batch.vae_image_indexes is None or batch.vae_seeds is None:
        raise ValueError(
            "a batch with latent tokens needs vae_images or vae_moments, vae_image_indexes and vae_seeds (made by "
            "Packer)"
        )
    moments = [*vae.encode_grouped(images, max_pixels_per_chunk=1), *cached]
    latents, noises = [], []
    grids = batch.patchified_vae_latent_shapes or []
    for place, seed, (h, w) in zip(batch.vae_image_indexes, batch.vae_seeds, grids, strict=True):
        generator = torch.Generator().manual_seed(seed)
        mean_and_log_variance = moments[place].float()
        channels = mean_and_log_variance.shape[0] // 2
        posterior = torch.randn((channels, *mean_and_log_variance.shape[1:]), generator=generator)
        latents.append(vae.sample(mean_and_log_variance, noise=posterior))
        noises.append(torch.randn(h * w, latent_patch_size**2 * channels, generator=generator))
    tokens = patchify_latents(latents, latent_patch_size)
    return tokens, torch.cat(noises).to(tokens.device)
