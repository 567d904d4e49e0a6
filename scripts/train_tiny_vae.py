"""python scripts/train_tiny_vae.py --out data_examples/tiny_vae

Trains a tiny FLUX-style autoencoder (1 M parameters) to reconstruct the example pictures: ten minutes on two cores.
The result lies in ``data_examples/tiny_vae`` already; run this only to change it. Writes ``ae.safetensors`` (stored in
float16) and ``config.json`` with the architecture and the measured scale and shift of the latents, and prints the peak
signal-to-noise ratio on held-out pictures. ``--steps 0`` only measures what lies in ``--out``; ``--start FOLDER``
continues from an autoencoder at half the learning rate.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from example_scenes import DATA_SEED, compose
from safetensors.torch import save_file
from torch import Tensor

from echo4o.model.config import VAEConfig
from echo4o.model.vae import AutoEncoder

TINY_VAE = VAEConfig(resolution=64, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
CROP = 32
CROP_SHARE = 0.75  # of the steps: small crops first, whole pictures at the end
PIXELS_PER_STEP = 64 * CROP * CROP
KL_WEIGHT = 1e-4
PEAK_LR = 2e-3
WARMUP_STEPS = 50


def pictures(split: str, rows: int, targets_only: bool = False) -> list[Tensor]:
    """References and targets of the example task: (3, H, W) in [-1, 1]."""
    first = -1 if targets_only else 0
    images = [image for row in range(rows) for image in compose(DATA_SEED, split, row).images()[first:]]
    return [torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1 for image in images]


def batches(images: list[Tensor], steps: int, crop_share: float, seed: int) -> Iterator[Tensor]:
    """Crops for the first steps, then whole pictures of one size at a time."""
    draw = random.Random(seed)
    by_size: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        by_size.setdefault(image.shape, []).append(image)
    sizes, shares = list(by_size), [len(group) for group in by_size.values()]
    for step in range(steps):
        if step < crop_share * steps:
            yield torch.stack([random_crop(draw.choice(images), draw) for _ in range(PIXELS_PER_STEP // CROP**2)])
        else:
            size = draw.choices(sizes, shares)[0]
            yield torch.stack(draw.choices(by_size[size], k=PIXELS_PER_STEP // (size[1] * size[2])))


def random_crop(image: Tensor, draw: random.Random) -> Tensor:
    top, left = (draw.randrange(0, side - CROP + 1, 8) for side in image.shape[1:])
    return image[:, top : top + CROP, left : left + CROP]


def train(steps: int, seed: int = 0, start: Path | None = None) -> AutoEncoder:
    """Reconstruction (L1 + squared error) with a little pull of the posterior towards the normal distribution."""
    torch.manual_seed(seed)
    model = AutoEncoder(replace(TINY_VAE, scale_factor=1.0, shift_factor=0.0))
    with torch.no_grad():
        model.encoder.conv_out.bias[TINY_VAE.z_channels :] = -4.0  # start with little noise in the latents
    if start is not None:
        model.load_state_dict(AutoEncoder.from_pretrained(start).state_dict())
    peak_lr, crop_share = (PEAK_LR, CROP_SHARE) if start is None else (PEAK_LR / 2, CROP_SHARE / 2)
    images = pictures("vae", 600) + 2 * pictures("vae", 600, targets_only=True)  # targets are the hardest
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=steps + 1, pct_start=min(0.3, WARMUP_STEPS / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step, batch in enumerate(batches(images, steps, crop_share, seed), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            moments = model.moments(batch)
            decoded = model.decode(model.sample(moments, generator=generator)).float()
        mean, log_variance = moments.float().chunk(2, dim=1)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        squared = F.mse_loss(decoded, batch)
        loss = F.l1_loss(decoded, batch) + squared + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds, ratio = time.monotonic() - started, -10 * torch.log10(squared / 4).item()
            print(f"step {step}/{steps}  PSNR {ratio:.1f} dB  KL {kl.item():.2f}  {seconds:.0f} s", flush=True)
    return with_unit_latents(model.eval(), pictures("vae", 100))


@torch.no_grad()
def with_unit_latents(model: AutoEncoder, images: list[Tensor]) -> AutoEncoder:
    """The same weights with the scale and shift that give latents of zero mean and unit variance."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(images))]
    z = torch.cat([latent.flatten() for latent in model.encode_images(images, generators=generators)])
    scale, shift = round(1 / z.std().item(), 4), round(z.mean().item(), 4)
    scaled = AutoEncoder(replace(model.config, scale_factor=scale, shift_factor=shift)).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


@torch.no_grad()
def psnr(model: AutoEncoder, images: list[Tensor]) -> list[float]:
    """Of each picture, in dB: encoded, sampled, decoded, rounded to bytes."""
    latents = model.encode_images(images, generators=[torch.Generator().manual_seed(i) for i in range(len(images))])
    ratios = []
    for image, latent in zip(images, latents, strict=True):
        decoded = ((model.decode(latent[None])[0].clamp(-1, 1) + 1) * 127.5).round()
        error = (decoded - (image + 1) * 127.5).square().mean().item()
        ratios.append(10 * np.log10(255**2 / max(error, 1e-2)))
    return ratios


def save(model: AutoEncoder, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "ae.safetensors", metadata={"format": "pt"})
    text = json.dumps({"vae_config": asdict(model.config)}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def report(folder: Path) -> None:
    model = AutoEncoder.from_pretrained(folder)
    images = pictures("heldout", 32)
    ratios = psnr(model, images)
    with torch.no_grad():
        moments = [m.chunk(2, dim=0) for m in model.encode_grouped(images)]
    means = torch.cat([mean.flatten() for mean, _ in moments])
    deviations = torch.cat([(0.5 * log_variance).exp().flatten() for _, log_variance in moments])
    size = (folder / "ae.safetensors").stat().st_size
    scaling = f"scale {model.config.scale_factor}, shift {model.config.shift_factor}"
    print(f"{folder / 'ae.safetensors'}: {size / 1e6:.2f} MB, {scaling}")
    print(f"held-out pictures: {len(images)}, PSNR mean {np.mean(ratios):.1f} dB, worst {min(ratios):.1f} dB")
    spread = f"mean {means.mean():.3f}, std {means.std():.3f}, posterior std {deviations.mean():.3f}"
    print(f"latents before scaling: {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, default=Path("data_examples/tiny_vae"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--start", type=Path, help="autoencoder to continue from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps:
        save(train(arguments.steps, arguments.seed, arguments.start), arguments.out)
    report(arguments.out)


if __name__ == "__main__":
    main()
