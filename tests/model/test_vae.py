"""The autoencoder against golden tensors, its published names, and its promises about sizes and noise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.model.config import VAEConfig
from echo4o.model.vae import AutoEncoder, infer_config

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="golden files are not here")
TINY = VAEConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, scale_factor=0.5, shift_factor=0.25)


@pytest.fixture(scope="module")
def tiny() -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(TINY).eval().requires_grad_(False)


@needs_shared
@pytest.mark.parametrize("case", ["multiref", "mixed", "frames"])
@torch.no_grad()
def test_encoding_equals_golden(case):
    folder = SHARED / "parity" / case
    model = AutoEncoder.from_pretrained(folder)
    golden = load_file(folder / "outputs.safetensors")
    images = load_file(folder / "batch.safetensors")["padded_images"]
    moments = model.moments(images)
    torch.testing.assert_close(moments, golden["vae_moments"], atol=1e-5, rtol=1e-4)
    latents = model.sample(moments, noise=golden["vae_noise"])
    torch.testing.assert_close(latents, golden["padded_latent"], atol=1e-5, rtol=1e-4)
    together = model.encode_images(list(images), noises=list(golden["vae_noise"]))
    torch.testing.assert_close(torch.stack(together), golden["padded_latent"], atol=1e-5, rtol=1e-4)


@needs_shared
def test_names_and_shapes_are_the_published_ones():
    manifest = json.loads((SHARED / "manifest" / "bagel_7b_mot.json").read_text())["vae"]
    with torch.device("meta"):
        model = AutoEncoder(VAEConfig())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 244
    assert shapes == manifest
    assert infer_config(manifest) == VAEConfig()


@torch.no_grad()
def test_an_image_does_not_see_its_neighbours(tiny):
    generator = torch.Generator().manual_seed(1)
    sizes = [(16, 32), (32, 16), (16, 32), (24, 24), (16, 32)]
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]
    for grouped in (tiny.encode_grouped(images), tiny.encode_grouped(images, max_pixels_per_chunk=16 * 32)):
        for image, moments in zip(images, grouped, strict=True):
            assert moments.shape == (32, image.shape[1] // 8, image.shape[2] // 8)
            torch.testing.assert_close(moments, tiny.moments(image[None])[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_noise_belongs_to_the_image(tiny):
    images = [torch.zeros(3, 16, 16), torch.ones(3, 16, 32), torch.zeros(3, 16, 16)]

    def encode(order):
        generators = [torch.Generator().manual_seed(100 + index) for index in order]
        latents = tiny.encode_images([images[index] for index in order], generators=generators)
        return dict(zip(order, latents, strict=True))

    first, second = encode([0, 1, 2]), encode([2, 1, 0])
    for index in range(3):
        torch.testing.assert_close(first[index], second[index], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(first[0], first[2])


@torch.no_grad()
def test_encode_samples_the_posterior(tiny):
    image = torch.rand(1, 3, 16, 16)
    mean, log_variance = tiny.moments(image).chunk(2, dim=1)
    latents = torch.stack([tiny.encode(image, torch.Generator().manual_seed(seed)) for seed in range(400)])
    expected = TINY.scale_factor * (mean - TINY.shift_factor)
    deviation = TINY.scale_factor * torch.exp(0.5 * log_variance)
    assert ((latents.mean(0) - expected).abs() < 6 * deviation / 20).all()
    assert ((latents.std(0) / deviation - 1).abs() < 0.2).all()
    again = [tiny.encode(image, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)
    torch.testing.assert_close(tiny.encode(image, noise=torch.zeros_like(mean)), expected)


@torch.no_grad()
def test_decode_inverts_the_scaling(tiny):
    z = torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    decoded = tiny.decode(TINY.scale_factor * (z - TINY.shift_factor))
    assert decoded.shape == (1, 3, 16, 24)
    torch.testing.assert_close(decoded, tiny.decoder(z), atol=1e-5, rtol=1e-5)


def test_odd_sizes_are_refused(tiny):
    with pytest.raises(ValueError, match="20 × 16 image.*multiples of 8"):
        tiny.moments(torch.zeros(1, 3, 16, 20))


@torch.no_grad()
def test_save_and_load(tiny, tmp_path):
    state = tiny.state_dict()
    save_file(state, tmp_path / "ae.safetensors")
    inferred = AutoEncoder.from_pretrained(tmp_path)
    assert (inferred.config.ch_mult, inferred.config.scale_factor) == (TINY.ch_mult, VAEConfig().scale_factor)
    (tmp_path / "config.json").write_text(json.dumps({"vae_config": {"ch_mult": [1, 1, 1, 2], **_numbers(TINY)}}))
    loaded = AutoEncoder.from_pretrained(tmp_path)
    assert loaded.config == TINY
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    half = AutoEncoder.from_pretrained(tmp_path / "ae.safetensors", dtype=torch.bfloat16)
    assert half.config == TINY
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert AutoEncoder.from_pretrained(tmp_path, device="meta").decoder.conv_in.weight.is_meta


def _numbers(config: VAEConfig) -> dict:
    names = ("ch", "num_res_blocks", "scale_factor", "shift_factor")
    return {name: getattr(config, name) for name in names}


def test_files_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ae\.safetensors does not exist"):
        AutoEncoder.from_pretrained(tmp_path)
    path = tmp_path / "ae.safetensors"
    state = tiny.state_dict()

    def attempt(changed):
        save_file(changed, path)
        return AutoEncoder.from_pretrained(path, config=TINY)

    with pytest.raises(ValueError, match=r"lacks decoder\.conv_out\.bias"):
        attempt({name: tensor for name, tensor in state.items() if name != "decoder.conv_out.bias"})
    with pytest.raises(ValueError, match="has surplus, which"):
        attempt({**state, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias as \(4,\) instead of \(3,\)"):
        attempt({**state, "decoder.conv_out.bias": torch.zeros(4)})
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no FLUX autoencoder"):
        AutoEncoder.from_pretrained(path)
