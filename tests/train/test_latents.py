"""Latents and noise belong to the image, not to its place in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sample import Sample, Segment
from echo4o.model.vae import AutoEncoder
from echo4o.train.latents import encode_batch
from tests.train.tiny_run import tiny_config

PACKING = PackingConfig(
    bos_token_id=0, eos_token_id=1, start_of_image=2, end_of_image=3, max_latent_size=8, vit_max_num_patch_per_side=4
)


def image(height: int, width: int, seed: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sample(seed: int, height: int, width: int) -> Sample:
    segments = (
        Segment("vae_image", image=image(32, 48, seed)),
        Segment("text", text_ids=(5, 6)),
        Segment("vae_image", image=image(height, width, seed + 100), loss=True),
    )
    return Sample(segments, seed=seed, name="a", row=f"a:{seed}")


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoEncoder(tiny_config().vae).eval()


def test_one_token_each_and_float32(vae: AutoEncoder) -> None:
    batch = Packer(PACKING).pack([sample(1, 64, 32)])
    latents, noise = encode_batch(vae, batch, 2)
    assert latents.shape == noise.shape == (2 * 3 + 4 * 2, 64)
    assert latents.dtype == noise.dtype == torch.float32
    assert not latents.requires_grad


def test_neighbours_change_nothing(vae: AutoEncoder) -> None:
    one, other = sample(1, 64, 32), sample(2, 32, 48)
    together = encode_batch(vae, Packer(PACKING).pack([other, one]), 2)
    alone = encode_batch(vae, Packer(PACKING).pack([one]), 2)
    count = len(alone[0])
    torch.testing.assert_close(together[0][-count:], alone[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(together[1][-count:], alone[1])


def test_seed_decides_noise_and_copies_of_one_image_differ(vae: AutoEncoder) -> None:
    batch = Packer(PACKING).pack([sample(1, 64, 32)])
    twice = replace(
        batch,
        patchified_vae_latent_shapes=[(2, 3), (2, 3)],
        vae_image_indexes=[0, 0],
        vae_seeds=[11, 12],
        packed_vae_token_indexes=torch.arange(12),
    )
    latents, noise = encode_batch(vae, twice, 2)
    again, noise_again = encode_batch(vae, replace(twice, vae_seeds=[12, 11]), 2)
    assert not torch.equal(latents[:6], latents[6:]) and not torch.equal(noise[:6], noise[6:])
    assert torch.equal(latents[:6], again[6:]) and torch.equal(noise[:6], noise_again[6:])


def test_batch_without_images_has_neither(vae: AutoEncoder) -> None:
    text = Sample((Segment("text", text_ids=(5, 6), loss=True),), seed=1)
    assert encode_batch(vae, Packer(PACKING).pack([text]), 2) == (None, None)


def test_tokens_without_images_are_refused(vae: AutoEncoder) -> None:
    batch = replace(Packer(PACKING).pack([sample(1, 64, 32)]), vae_images=None)
    with pytest.raises(ValueError, match="vae_images"):
        encode_batch(vae, batch, 2)
