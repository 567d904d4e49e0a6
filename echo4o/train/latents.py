"""Images of a batch to latent tokens and flow noise, both determined by the image's own seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from echo4o.model.embeddings import patchify_latents
from echo4o.model.vae import AutoEncoder
from echo4o.packed import PackedBatch

logger = logging.getLogger(__name__)


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


class LatentCounts:
    """Images of the packs since the last `reset`: taken from ``latent_cache``, or encoded for want of it. An image that
    is laid down several times counts once for the VAE.

    Args:
        cache: its folder; nothing is counted without one.
    """

    def __init__(self, cache: str | None) -> None:
        self.cache = cache
        self.has_warned = False
        self.reset()

    def reset(self) -> None:
        self.num_cached = self.num_encoded = self.num_vit_cached = self.num_vit_encoded = 0

    def add(self, batches: Sequence[PackedBatch]) -> None:
        """The first image that the cache lacks is reported with its pack."""
        if self.cache is None:
            return
        for batch in batches:
            missing = len(batch.vae_images or ())
            self.num_cached += len(batch.vae_moments or ())
            self.num_encoded += missing
            cached = sum(batch.vit_is_encoded or ())
            self.num_vit_cached += cached
            self.num_vit_encoded += (0 if batch.vit_token_seqlens is None else len(batch.vit_token_seqlens)) - cached
            if missing and not self.has_warned:
                self.has_warned = True
                logger.warning(
                    "%d images of a pack (rows %s) are not in latent_cache %s: they are decoded and encoded as ever, "
                    "data/latents_encoded counts them. Run echo4o data cache again to add what is missing",
                    missing,
                    ", ".join(batch.sample_rows[:8]) or "unknown",
                    self.cache,
                )

    def counters(self) -> dict[str, int]:
        """For the metrics."""
        if self.cache is None:
            return {}
        return {
            "data/latents_cached": self.num_cached,
            "data/latents_encoded": self.num_encoded,
            "data/vit_cached": self.num_vit_cached,
            "data/vit_encoded": self.num_vit_encoded,
        }
