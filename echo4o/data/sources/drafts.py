"""A row between reading and decoding: segments with known token counts whose images are still encoded bytes."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import DEFAULT_PIXEL_LIMIT, ImageTransform, open_image, printable, probe_size, to_tensor
from echo4o.data.latent_cache import LatentCache
from echo4o.data.latent_keys import content_hash
from echo4o.data.positions import check_grid
from echo4o.data.sample import Sample, Segment
from echo4o.data.sources.base import Limits
from echo4o.data.tokenizer import Tokenizer

#: Start and end marker of an image, bos and eos of a text.
NUM_MARKERS = 2
#: No image file is smaller than this in base64; a shorter text is a path.
_MIN_BASE64 = 48
#: Longest path of common file systems; no longer text is worth looking up.
_MAX_PATH = 4096


def unreadable_row(error: Exception) -> RowError:
    """What no one foresaw about a row, as a bad row."""
    message = printable(str(error))
    return RowError("row unreadable", detail=f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _from_base64(text: str) -> bytes:
    """Raises ValueError (binascii.Error, or plain for characters beyond ASCII) if it is no base64."""
    return base64.b64decode("".join(text.split()), validate=True)


class Picture(Protocol):
    """An image of known size that has not been decoded."""

    @property
    def size(self) -> tuple[int, int]: ...

    def decode(self) -> Image.Image: ...


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """An image file in memory or on disk; `size` is (width, height) as seen upright."""

    data: bytes | Path
    size: tuple[int, int]
    pixel_limit: int = DEFAULT_PIXEL_LIMIT

    def decode(self) -> Image.Image:
        return open_image(self.data, self.pixel_limit)


@dataclass(frozen=True)
class PictureReader:
    """Turns what a row holds for an image into a Picture.

    Accepts encoded bytes, a path, a data URL or base64 text, and ``{"bytes": …, "path": …}`` with any of these.

    Args:
        folders: where relative paths may start, tried in order. A path that begins with ``/`` but does not exist is
            looked for below them too, since some data sets ship such paths.
        pixel_limit: larger images are refused.
    """

    folders: tuple[Path, ...] = ()
    pixel_limit: int = DEFAULT_PIXEL_LIMIT

    def __call__(self, value: Any) -> EncodedPicture:
        """Raises RowError if there is no image or its header is unreadable."""
        data = self._resolve(value)
        return EncodedPicture(data, probe_size(data, self.pixel_limit), self.pixel_limit)

    def _resolve(self, value: Any) -> bytes | Path:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, str) and value:
            return self._from_text(value)
        if value is None or value == "":
            raise RowError("image missing", detail="the row holds no bytes and no path")
        raise RowError("wrong column type", detail=f"an image is {type(value).__name__}, not bytes or a path")

    def _from_text(self, text: str) -> bytes | Path:
        """A data URL or base64 text is decoded; what is short, has a dot or names an existing file is a path."""
        if text.startswith("data:"):
            try:
                return _from_base64(text.partition(",")[2])
            except ValueError as error:
                raise RowError("image unreadable", detail=f"broken data URL: {error}") from error
        if len(text) < _MIN_BASE64 or "." in text:
            return self.path(text)
        if len(text) <= _MAX_PATH:
            with contextlib.suppress(OSError):  # not even a possible file name
                existing = self._existing(text)
                if existing is not None:
                    return existing
        data = b""
        with contextlib.suppress(ValueError):  # not base64
            data = _from_base64(text)
        return data or self.path(text)

    def path(self, text: str) -> Path:
        """First existing candidate for a path; the plain one if none exists."""
        try:
            return self._existing(text) or self._candidates(text)[0]
        except OSError as error:
            raise RowError("image missing", detail=f"{text[:80]}…: {error.strerror}") from error

    def _existing(self, text: str) -> Path | None:
        return next((candidate for candidate in self._candidates(text) if candidate.exists()), None)

    def _candidates(self, text: str) -> list[Path]:
        path = Path(text)
        candidates = [folder / text.lstrip("/") for folder in self.folders]
        if path.is_absolute() or not candidates:
            candidates.insert(0, path)
        return candidates


@dataclass(frozen=True)
class SegmentDraft:
    """A segment whose token count is known. `size` is the (width, height) its picture will be resized to."""

    kind: str
    num_tokens: int
    text_ids: tuple[int, ...] = ()
    picture: Picture | None = None
    size: tuple[int, int] = (0, 0)
    loss: bool = False
    droppable: bool = False


@dataclass(frozen=True)
class Drafter:
    """Drafts segments: tokenises, applies the resize rule, checks the grid, counts tokens.

    Args:
        tokenizer: for texts.
        limits: patch sizes and position tables of the model.
        vae_transform, vit_transform: resize rules; None where a source has no such image.
    """

    tokenizer: Tokenizer
    limits: Limits
    vae_transform: ImageTransform | None = None
    vit_transform: ImageTransform | None = None

    def text(self, text: str, *, loss: bool = False, droppable: bool = False) -> SegmentDraft:
        ids = tuple(self.tokenizer.encode(text))
        return SegmentDraft("text", len(ids) + NUM_MARKERS, text_ids=ids, loss=loss, droppable=droppable)

    def vae_image(
        self, picture: Picture, *, loss: bool, droppable: bool, shrink: Callable | None = None
    ) -> SegmentDraft:
        """Latent tokens of a picture. Raises GridError if it exceeds the position table."""
        assert self.vae_transform is not None
        grid = (self.limits.latent_downsample, self.limits.max_latent_size)
        return self._image("vae_image", picture, self.vae_transform, grid, 1, shrink, loss, droppable)

    def vit_image(
        self, picture: Picture, *, droppable: bool, img_num: int = 1, shrink: Callable | None = None
    ) -> SegmentDraft:
        """Understanding tokens of a picture. Raises GridError if it exceeds the position table."""
        assert self.vit_transform is not None
        grid = (self.limits.vit_patch_size, self.limits.vit_max_num_patch_per_side)
        return self._image("vit_image", picture, self.vit_transform, grid, img_num, shrink, False, droppable)

    def resize_rules(self) -> dict[str, dict[str, Any]]:
        """Kind of image → its transform."""
        transforms = {"vae_image": self.vae_transform, "vit_image": self.vit_transform}
        return {kind: dataclasses.asdict(rule) for kind, rule in transforms.items() if rule is not None}

    def _image(
        self,
        kind: str,
        picture: Picture,
        transform: ImageTransform,
        grid: tuple[int, int],
        img_num: int,
        shrink: Callable[[int, int, int], tuple[int, int]] | None,
        loss: bool,
        droppable: bool,
    ) -> SegmentDraft:
        width, height = transform.target_size(*picture.size, img_num)
        if shrink is not None:
            width, height = shrink(width, height, transform.image_stride)
        patch, max_per_side = grid
        if not self.limits.interpolate_pos:
            check_grid(height, width, patch, max_per_side)
        num_tokens = (height // patch) * (width // patch) + NUM_MARKERS
        return SegmentDraft(kind, num_tokens, picture=picture, size=(width, height), loss=loss, droppable=droppable)


@dataclass
class SampleLoader:
    """Decodes a drafted row. Each picture is decoded once; each (picture, size) becomes one tensor object, so that an
    image laid down several times is encoded by the VAE once. What `cache` holds of a picture is taken from there."""

    drafts: Sequence[SegmentDraft]
    seed: int
    name: str
    file: str
    row: int
    cache: LatentCache | None = None
    _contents: dict[int, bytes] = field(default_factory=dict, repr=False)
    _encoded: dict[tuple[str, int, tuple[int, int]], Tensor | None] = field(default_factory=dict, repr=False)
    _tensors: dict[tuple[int, tuple[int, int]], Tensor] = field(default_factory=dict, repr=False)
    _decoded: dict[int, Image.Image] = field(default_factory=dict, repr=False)

    def __call__(self) -> Sample:
        """Raises RowError, with file and row, if an image turns out to be broken."""
        try:
            segments = tuple(self._segment(draft) for draft in self.drafts)
        except RowError as error:
            raise error.at(self.file, self.row) from error
        except DataError:
            raise
        except Exception as error:  # one odd row among millions must be counted, not end the run
            raise unreadable_row(error).at(self.file, self.row) from error
        finally:
            for kept in (self._tensors, self._decoded, self._encoded, self._contents):
                kept.clear()
        return Sample(segments, seed=self.seed, name=self.name, row=f"{self.file}:{self.row}")

    def _segment(self, draft: SegmentDraft) -> Segment:
        image = encoded = size = None
        if draft.picture is not None:
            cache = self.cache if self.cache is not None and draft.kind in self.cache.stores else None
            if cache is not None and isinstance(draft.picture, EncodedPicture):
                encoded, size = self._from_cache(cache, draft.kind, draft.picture, draft.size), draft.size
            if encoded is None:
                image = self._tensor(draft.picture, draft.size)
                if cache is not None and cache.strict and size is not None:
                    raise cache.missing(draft.kind, f"{self.file}:{self.row}", size)
        return Segment(
            draft.kind,
            text_ids=draft.text_ids,
            image=image,
            loss=draft.loss,
            droppable=draft.droppable,
            encoded=encoded,
            size=size,
        )

    def _from_cache(
        self, cache: LatentCache, kind: str, picture: EncodedPicture, size: tuple[int, int]
    ) -> Tensor | None:
        key = (kind, id(picture), size)
        if key not in self._encoded:
            if id(picture) not in self._contents:
                try:
                    self._contents[id(picture)] = content_hash(picture.data)
                except OSError:
                    return None  # decoding it will tell why
            self._encoded[key] = cache.find(kind, self._contents[id(picture)], size)
        return self._encoded[key]

    def _tensor(self, picture: Picture, size: tuple[int, int]) -> Tensor:
        key = (id(picture), size)
        if key not in self._tensors:
            if id(picture) not in self._decoded:
                self._decoded[id(picture)] = picture.decode()
            self._tensors[key] = to_tensor(self._decoded[id(picture)], size)
        return self._tensors[key]
