"""The frozen encoders of a run, as a cache sees them: what they are, and what they make of one image."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from echo4o.data.latent_cache import Identity
from echo4o.model.vae import AutoEncoder

_CHUNK_BYTES = 1 << 24


class Encoder(Protocol):
    """Makes of one image what training would make of it."""

    identity: Identity

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) in [-1, 1] → `Identity.shape`, on the CPU, in the stored dtype."""
        ...


def file_fingerprint(path: Path) -> str:
    """BLAKE2b of a weights file, all of it."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def vae_identity(vae: AutoEncoder, fingerprint: str, products: torch.dtype, stored: str = "float32") -> Identity:
    """What VAE moments depend on.

    Args:
        fingerprint: of the file of `vae` (`file_fingerprint`).
        products: dtype of matrix products in training.
    """
    config = vae.config
    return Identity(
        "vae_image", fingerprint, dtype_name(products), stored, patch=config.downsample, channels=2 * config.z_channels
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class VaeEncoder:
    """Moments as `echo4o.train.latents.encode_batch` finds them."""

    def __init__(self, vae: AutoEncoder, identity: Identity) -> None:
        self.vae = vae
        self.identity = identity
        self.device = vae.encoder.conv_in.weight.device

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        with products_in(self.identity, self.device):
            moments = self.vae.encode_grouped([image.to(self.device, non_blocking=True)])[0]
        return moments.to(self.identity.dtype).cpu().contiguous()


def products_in(identity: Identity, device: torch.device) -> AbstractContextManager:
    """As `Engine.autocast` of a run."""
    if identity.products == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, identity.products))


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of named tensors, whatever file they come from."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{dtype_name(tensor.dtype)}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
