"""FLUX autoencoder: images to 16-channel latents at an eighth of their size, and back.

The architecture and the parameter names are those of black-forest-labs/flux (``ae.safetensors``). Images are encoded
at their own size and never padded: upstream pads a batch to its largest image, so that latents depend on neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from echo4o.model.config import SCALAR_FILES, VAEConfig
from echo4o.model.pretrained import iter_tensors, read_shapes

WEIGHTS_FILE = "ae.safetensors"
DEFAULT_CHUNK_PIXELS = 4 * 1024 * 1024


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all pixels, one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def resnet_blocks(in_channels: int, out_channels: int, num_blocks: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * num_blocks
    return nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))


class DownLevel(nn.Module):
    """The residual blocks of one resolution, then the step to half of it (on all levels but the last)."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, is_last: bool):
        super().__init__()
        self.block = resnet_blocks(in_channels, out_channels, num_blocks)
        self.downsample = None if is_last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    """The residual blocks of one resolution, then the step to twice of it (on all levels but the first)."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, is_first: bool):
        super().__init__()
        self.block = resnet_blocks(in_channels, out_channels, num_blocks)
        self.upsample = None if is_first else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch, *(config.ch * multiplier for multiplier in config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[i], widths[i + 1], config.num_res_blocks, is_last=i == last) for i in range(last + 1)
        )
        self.mid = MidBlock(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Levels are numbered as the encoder's: ``up.0`` has the full resolution and comes last."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(widths[i + 1], widths[i], config.num_res_blocks + 1, is_first=i == 0)
            for i in range(len(config.ch_mult))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encoder, diagonal Gaussian posterior and decoder.

    Latents are scaled, ``scale_factor · (z − shift_factor)``, so that their variance is about one.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance of the posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W are multiples of ``config.downsample``.

        Returns:
            (B, 2·z, H/8, W/8): the means, then the log variances.

        Raises:
            ValueError: for sides that are not multiples of ``config.downsample``.
        """
        height, width = images.shape[-2:]
        if height % self.config.downsample or width % self.config.downsample:
            raise ValueError(
                f"a {width} × {height} image has sides that are not multiples of {self.config.downsample}; "
                "resize it first (image_stride in image_transform_args)"
            )
        return self.encoder(images)

    def sample(self, moments: Tensor, noise: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Draw scaled latents from the posterior.

        Args:
            moments: (..., 2·z, h, w).
            noise: (..., z, h, w) standard normal; drawn in float32 on the generator's device when absent, so that one
                seed gives the same latents in every dtype and on every machine.

        Returns:
            (..., z, h, w).
        """
        mean, log_variance = moments.chunk(2, dim=-3)
        if noise is None:
            device = moments.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, device=device)
        z = mean + torch.exp(0.5 * log_variance) * noise.to(mean)
        return self.config.scale_factor * (z - self.config.shift_factor)

    def encode(self, images: Tensor, generator: Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, z, H/8, W/8), sampled from the posterior."""
        return self.sample(self.moments(images), noise, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, z, h, w) to images (B, 3, 8·h, 8·w), about in [-1, 1] (not clamped)."""
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Reconstruct images."""
        return self.decode(self.encode(images, generator))

    def encode_grouped(
        self, images: Sequence[Tensor], max_pixels_per_chunk: int = DEFAULT_CHUNK_PIXELS
    ) -> list[Tensor]:
        """Moments of images of any sizes: equal sizes share a batch, nothing is padded.

        Args:
            images: (3, H, W) each, in [-1, 1].
            max_pixels_per_chunk: upper limit of the pixels encoded at once (at least one image is).

        Returns:
            (2·z, H/8, W/8) for each image, in the order given.
        """
        indexes_by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            indexes_by_size.setdefault(image.shape, []).append(index)
        moments: list[Tensor] = [torch.empty(0)] * len(images)
        parameter = self.encoder.conv_in.weight
        for size, indexes in indexes_by_size.items():
            chunk = max(1, max_pixels_per_chunk // (size[-2] * size[-1]))
            for start in range(0, len(indexes), chunk):
                chosen = indexes[start : start + chunk]
                batch = torch.stack([images[index].to(parameter) for index in chosen])
                for index, result in zip(chosen, self.moments(batch), strict=True):
                    moments[index] = result
        return moments

    def encode_images(
        self,
        images: Sequence[Tensor],
        noises: Sequence[Tensor | None] | None = None,
        generators: Sequence[Generator | None] | None = None,
        max_pixels_per_chunk: int = DEFAULT_CHUNK_PIXELS,
    ) -> list[Tensor]:
        """Scaled latents of images of any sizes; the noise belongs to the image, not to its place in a batch.

        Args:
            images: (3, H, W) each, in [-1, 1].
            noises: (z, H/8, W/8) each.
            generators: one for each image, used where there is no noise.

        Returns:
            (z, H/8, W/8) for each image, in the order given.
        """
        noises = [None] * len(images) if noises is None else noises
        generators = [None] * len(images) if generators is None else generators
        moments = self.encode_grouped(images, max_pixels_per_chunk)
        return [self.sample(*item) for item in zip(moments, noises, generators, strict=True)]

    @classmethod
    def from_pretrained(
        cls,
        folder_or_file: str | Path,
        config: VAEConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> AutoEncoder:
        """Load ``ae.safetensors``.

        Args:
            folder_or_file: a model folder, or the weights file itself.
            config: by default the ``vae_config`` in ``config.json`` (or ``bagel_config.json``) beside the weights;
                where there is none, read off the tensor shapes with the published FLUX scale and shift.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if tensors are missing, left over or of another shape.
        """
        path = Path(folder_or_file)
        path = path / WEIGHTS_FILE if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; the autoencoder is expected there (FLUX's ae.safetensors)")
        shapes = read_shapes(path)
        config = config or _stated_config(path.parent) or infer_config(shapes, str(path))
        with torch.device("meta"):
            model = cls(config)
        _check_shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, shapes, str(path))
        state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in iter_tensors(path)}
        model.load_state_dict(state, assign=True)
        return model.eval()


def infer_config(shapes: Mapping[str, Sequence[int]], source: str = "the state dict") -> VAEConfig:
    """Read an architecture off its tensor shapes.

    The scale and the shift of the latents are in no tensor: they get FLUX's published values.

    Raises:
        ValueError: if these are not the tensors of a FLUX autoencoder.
    """
    levels = sum(f"encoder.down.{level}.block.0.conv1.weight" in shapes for level in range(16))
    blocks = sum(f"encoder.down.0.block.{block}.conv1.weight" in shapes for block in range(16))
    if not levels or "encoder.conv_in.weight" not in shapes or "decoder.conv_out.weight" not in shapes:
        raise ValueError(
            f"{source} is no FLUX autoencoder: encoder.conv_in.weight, encoder.down.0.block.0.conv1.weight or "
            "decoder.conv_out.weight is missing (diffusers names them otherwise: use FLUX's ae.safetensors)"
        )
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    return VAEConfig(
        in_channels=in_channels,
        downsample=2 ** (levels - 1),
        ch=ch,
        out_ch=shapes["decoder.conv_out.weight"][0],
        ch_mult=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // ch for level in range(levels)),
        num_res_blocks=blocks,
        z_channels=shapes["decoder.conv_in.weight"][1],
    )


def _stated_config(folder: Path) -> VAEConfig | None:
    for path in (folder / name for name in SCALAR_FILES):
        if path.exists() and (values := json.loads(path.read_text(encoding="utf-8")).get("vae_config")):
            return VAEConfig(**{key: value for key, value in values.items() if key in VAEConfig.__annotations__})
    return None


def _check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], source: str) -> None:
    faults = [f"lacks {name}" for name in expected if name not in found]
    faults += [f"has {name}, which the config does not ask for" for name in found if name not in expected]
    faults += [
        f"holds {name} as {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if faults:
        raise ValueError(
            f"{source} does not fit its config ({len(faults)} tensors): it {'; it '.join(faults[:3])}. "
            "Correct vae_config in config.json, or remove it to have the architecture read off the tensors."
        )
