"""References as the model reads them, and latents back to pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor

from echo4o.data.images import ImageTransform, open_image, to_rgb, to_tensor
from echo4o.generate.context import LatentImage
from echo4o.generate.request import ImageLike
from echo4o.model.embeddings import patchify_latents, unpatchify_latents
from echo4o.model.vae import AutoEncoder


class ImageEncoder:
    """Encodes the images of a run; one that several requests use is opened, resized and encoded once.

    Args:
        patch: latent pixels a side of a token.
        vae_transform, vit_transform: as upstream, the ViT's is applied to the image already resized for the VAE.
    """

    def __init__(
        self, vae: AutoEncoder | None, patch: int, vae_transform: ImageTransform, vit_transform: ImageTransform
    ) -> None:
        self.vae, self.patch = vae, patch
        self.vae_transform, self.vit_transform = vae_transform, vit_transform
        self._resized: dict[object, Image.Image] = {}
        self._moments: dict[object, Tensor] = {}

    def resized(self, element: ImageLike) -> Image.Image:
        """RGB, in the size of the VAE's transform.

        Raises:
            ValueError: for a file that is not there or holds no picture.
        """
        key = _key(element)
        if key not in self._resized:
            is_open = isinstance(element, Image.Image)
            image = to_rgb(ImageOps.exif_transpose(element)) if is_open else open_image(element)
            size = self.vae_transform.target_size(*image.size)
            self._resized[key] = image.resize(size, Image.Resampling.BICUBIC)
        return self._resized[key]

    def latents(self, element: ImageLike, noise: Tensor | None, generator: Generator) -> LatentImage:
        """Latent tokens of a reference, drawn from its posterior with `noise`, else with the generator's.

        Raises:
            ValueError: if the model has no generation branch.
        """
        if self.vae is None:
            raise ValueError("this model has no generation branch (visual_gen is False): it can only answer in text")
        key = _key(element)
        if key not in self._moments:
            image = self.resized(element)
            pixels = to_tensor(image, image.size)[None]
            self._moments[key] = self.vae.moments(pixels.to(next(self.vae.parameters()))).float()
        generator_or_none = None if noise is not None else generator
        latents = self.vae.sample(self._moments[key], noise=noise, generator=generator_or_none)[0]
        grid = (latents.shape[1] // self.patch, latents.shape[2] // self.patch)
        return LatentImage(patchify_latents([latents], self.patch), grid)

    def pixels(self, element: ImageLike) -> Tensor:
        """(3, H, W) for the vision encoder."""
        return self.vit_transform(self.resized(element))


def _key(element: ImageLike) -> object:
    """Images in memory are told apart by identity: the requests keep them alive as long as the encoder."""
    return element if isinstance(element, Path) else id(element)


def decode(vae: AutoEncoder, tokens: Tensor, grid: tuple[int, int], patch: int) -> Image.Image:
    """Latent tokens (h · w, p·p·C) of a (h, w) grid → picture."""
    latents = unpatchify_latents(tokens, [grid], patch)[0]
    pixels = vae.decode(latents[None].to(next(vae.parameters())))[0].float()
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
