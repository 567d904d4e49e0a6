"""Open, orient, turn to RGB, resize, normalise. The resize rule is upstream's, number for number."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from echo4o.data.errors import RowError

ImageData = bytes | str | Path
PIXEL_CAPS = ("linear", "sqrt")
DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024
#: Pillow's own hard limit against decompression bombs; a larger value than this cannot be had without its global.
DEFAULT_PIXEL_LIMIT = 2 * int(1024 * 1024 * 1024 // 4 // 3)

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageTransform:
    """Resize to a multiple of the stride and normalise to [-1, 1].

    Args:
        max_image_size: longest side in pixels.
        min_image_size: shortest side in pixels; very elongated images may end below it.
        image_stride: both sides become multiples of it.
        max_pixels: of one image; divided by the number of images for multi-image samples.
        pixel_cap: ``linear`` scales both sides by the ratio of the areas as upstream does, which shrinks more than
            needed; ``sqrt`` scales the sides by its square root, so that the area meets the cap.
    """

    max_image_size: int
    min_image_size: int
    image_stride: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    pixel_cap: str = "linear"

    def __post_init__(self) -> None:
        if self.pixel_cap not in PIXEL_CAPS:
            raise ValueError(f"pixel_cap is {self.pixel_cap!r}; known: {', '.join(PIXEL_CAPS)}")
        for name in ("max_image_size", "min_image_size", "image_stride", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def target_size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """(width, height) after the transform of a `width` × `height` image in a sample of `img_num` images."""
        scale = min(self.max_image_size / max(width, height), 1.0)
        scale = max(scale, self.min_image_size / min(width, height))
        width, height = self._scaled(width, height, scale)

        budget = self.max_pixels / img_num
        if width * height > budget:
            ratio = budget / (width * height)
            width, height = self._scaled(width, height, ratio if self.pixel_cap == "linear" else math.sqrt(ratio))

        if max(width, height) > self.max_image_size:
            width, height = self._scaled(width, height, self.max_image_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        return self._to_stride(round(width * scale)), self._to_stride(round(height * scale))

    def _to_stride(self, side: int) -> int:
        return max(self.image_stride, round(side / self.image_stride) * self.image_stride)

    def __call__(self, image: Image.Image, img_num: int = 1) -> Tensor:
        """(3, H, W) float32 in [-1, 1] of an RGB image."""
        return to_tensor(image, self.target_size(*image.size, img_num))


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resize an RGB image to `size` (width, height) and normalise: (3, H, W) float32 in [-1, 1]."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def fit_pixels(width: int, height: int, budget: int, stride: int) -> tuple[int, int]:
    """Shrink a size by the square-root rule until its area is within `budget`, in multiples of `stride`."""
    if width * height <= budget:
        return width, height
    scale = math.sqrt(budget / (width * height))
    sides = (max(stride, math.floor(side * scale / stride) * stride) for side in (width, height))
    fitted_width, fitted_height = sides
    return fitted_width, fitted_height


def probe_size(source: ImageData, pixel_limit: int = DEFAULT_PIXEL_LIMIT) -> tuple[int, int]:
    """(width, height) as seen upright, from the header alone.

    Raises:
        RowError: if there is no image, it cannot be read, or it has more than `pixel_limit` pixels.
    """
    with _opened(source, pixel_limit) as image:
        width, height = image.size
        # Pillow already turns the size (and later the pixels) of TIFF files.
        if image.format != "TIFF" and _orientation(image) in _SIDEWAYS:
            return height, width
        return width, height


def open_image(source: ImageData, pixel_limit: int = DEFAULT_PIXEL_LIMIT) -> Image.Image:
    """Decode an image, upright and in RGB.

    Args:
        source: encoded bytes or a path.
        pixel_limit: images with more pixels are refused before they are decoded; at most Pillow's own limit.

    Raises:
        RowError: with reason ``image missing``, ``image empty``, ``image unreadable``, ``image truncated`` or
            ``image too large``.
    """
    with _opened(source, pixel_limit) as image:
        sideways_or_flipped = image.format != "TIFF" and _orientation(image) not in (None, 1)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image) if sideways_or_flipped else image
            return to_rgb(upright)
        except Exception as error:  # Pillow's plugins raise whatever their parser trips over
            reason = "image truncated" if "truncated" in str(error).lower() else "image unreadable"
            raise RowError(reason, detail=f"{_describe(source)}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with transparency pasted on white. As upstream, the alpha of greyscale (LA) images is dropped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image)
    if image.mode in ("RGBA", "PA", "RGBa") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey at 255 (all white); scale it instead. Floats are taken as [0, 1] or [0, 255]."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    peak = values.max(initial=0)
    if image.mode == "F":
        values = values * 255 if peak <= 1 else values
    elif image.mode.startswith("I;16") or peak > 255:
        values = values / (257 if peak <= 65535 else peak / 255)
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8)).convert("RGB")


def _opened(source: ImageData, pixel_limit: int) -> Image.Image:
    if isinstance(source, bytes) and not source:
        raise RowError("image empty", detail="zero bytes")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RowError("image missing", detail=_describe(source)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image too large", detail=f"{_describe(source)}: {error}") from error
    except UnidentifiedImageError as error:
        empty = not isinstance(source, bytes) and Path(source).stat().st_size == 0
        raise RowError("image empty" if empty else "image unreadable", detail=_describe(source)) from error
    except Exception as error:  # Pillow's plugins raise whatever their parser trips over
        raise RowError("image unreadable", detail=f"{_describe(source)}: {error}") from error
    width, height = image.size
    if width * height > pixel_limit or not width * height:
        image.close()
        reason = "image too large" if width * height else "image unreadable"
        raise RowError(reason, detail=f"{_describe(source)}: {width} × {height} px; the limit is {pixel_limit} pixels")
    return image


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation 1…8, read only where the header announces EXIF."""
    if not any(key in image.info for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")):
        return None
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata, in whatever way, must not cost a readable image
        return None


def _describe(source: ImageData) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else printable(str(source))


def printable(text: str) -> str:
    """Text that any log can take: lone surrogates, which UTF-8 cannot encode, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
