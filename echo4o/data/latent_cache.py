"""What frozen encoders made of images, kept on disk: VAE moments and, optionally, the vision encoder's outputs.

A cache is a folder with one store a kind of image, ``vae`` and ``vit``. A store holds

=====================  ==========================================================================================
``identity.json``      what the encoder is: its weights, the dtype of its products, the dtype that is stored
``rules/*.json``       resize rules of the groups that were cached
``shards/*``           safetensors of finished work; names in them are content hash and size (`latent_keys`)
``index.safetensors``  where every image lies: a short cut to reading the shards
=====================  ==========================================================================================

A shard has its name only when it is complete, so that a store may be read while others write to it.
`echo4o.train.latent_cache` fills stores; here they are only read.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo4o.data.errors import DataError
from echo4o.data.latent_index import SHARDS, Index, read_index
from echo4o.data.latent_keys import image_key, key_size, rule_file

IDENTITY, RULES = "identity.json", "rules"
STORES = {"vae_image": "vae", "vit_image": "vit"}
ENCODERS = {"vae_image": "VAE", "vit_image": "vision encoder"}
#: How pixels come about (`echo4o.data.images`): upright, on white, bicubic, [-1, 1]. Other pixels get another number.
PIXELS = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KEPT_DESCRIPTORS = 64


@dataclass(frozen=True)
class Identity:
    """What the tensors of a store depend on beside the image. Stored as JSON.

    Attributes:
        kind: ``vae_image`` or ``vit_image``.
        weights: fingerprint of the encoder's weights.
        products: dtype of its matrix products, ``float32`` or ``bfloat16``.
        stored: dtype of the tensors.
        patch: pixels a side of one place of the grid.
        channels: numbers at each place.
        settings: what else the encoder's output depends on.
        pixels: version of the pixels.
    """

    kind: str
    weights: str
    products: str
    stored: str
    patch: int
    channels: int
    settings: str = ""
    pixels: int = PIXELS

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Of an image of (width, height): (channels, h, w) of a VAE image, (h · w, channels) of a ViT image."""
        width, height = size[0] // self.patch, size[1] // self.patch
        return (self.channels, height, width) if self.kind == "vae_image" else (height * width, self.channels)

    def num_bytes(self, key: bytes) -> int:
        """Of the tensor of a key."""
        return math.prod(self.shape(key_size(key))) * _DTYPES[self.stored].itemsize

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.stored]

    def changes(self, other: Identity, *, also_stored: bool) -> list[str]:
        """What `other` has otherwise, in words."""
        words = {
            "weights": f"the weights of the {ENCODERS[self.kind]}",
            "products": "the dtype of products (--dtype)",
            "stored": "the stored dtype",
            "pixels": "the way to pixels",
        }
        names = [name for name in self.__dict__ if name != "stored" or also_stored]
        pairs = [(words.get(name, name), getattr(self, name), getattr(other, name)) for name in names]
        return [f"{what}: {mine} in the cache, {theirs} here" for what, mine, theirs in pairs if mine != theirs]


def store_folder(cache: Path, kind: str) -> Path:
    """Of a kind of image in a cache."""
    return cache / STORES[kind]


class LatentStore:
    """The tensors of one kind of image, by content and size.

    Args:
        folder: of the store.

    Raises:
        DataError: if there is no store, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = read_identity(folder)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @cached_property
    def index(self) -> Index:
        """As the folder was when it was first asked for."""
        return read_index(self.folder, self.identity.num_bytes)

    def find(self, content: bytes, size: tuple[int, int]) -> Tensor | None:
        """The tensor of an image (`Identity.shape`, in the stored dtype), or None where it was not cached.

        Args:
            content: its `content_hash`.
            size: (width, height) that it is resized to.

        Raises:
            DataError: if a shard has become unreadable.
        """
        key = image_key(content, size)
        place = self.index.place(key)
        if place is None:
            return None
        shard, length = int(self.index.shard_of[place]), self.identity.num_bytes(key)
        try:
            data = os.pread(self._descriptor(shard), length, int(self.index.offsets[place]))
        except OSError as error:
            raise DataError(f"the cache {self.folder} has become unreadable: {error}. {self._remedy}") from error
        if len(data) != length:
            raise DataError(f"{self._path(shard)} has become shorter. {self._remedy}")
        return torch.frombuffer(bytearray(data), dtype=self.identity.dtype).reshape(self.identity.shape(size))

    @property
    def _remedy(self) -> str:
        return "Repair it with echo4o data cache, or train without latent_cache."

    def _path(self, shard: int) -> Path:
        return self.folder / SHARDS / self.index.shards[shard][0]

    def _descriptor(self, shard: int) -> int:
        # pread: descriptors are inherited by forked workers, which must not share a file position.
        if shard not in self._descriptors:
            if len(self._descriptors) >= _KEPT_DESCRIPTORS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._path(shard), os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    # ------------------------------------------------------------ does it fit

    def require(self, identity: Identity) -> None:
        """Raises DataError unless the store was made by this encoder; the stored dtype is the store's own matter."""
        if changes := self.identity.changes(identity, also_stored=False):
            raise DataError(
                f"the cache {self.folder} is stale: {'; '.join(changes)}.\n"
                "  Make another one (echo4o data cache CONFIG --out OTHER_FOLDER) or remove this folder and make it "
                "anew, restore what it was made with, or train without latent_cache."
            )

    def require_rules(self, rules: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises DataError unless each rule (group → `GroupRows.resize_rule`) was cached."""
        for group, rule in rules.items():
            if not (self.folder / RULES / rule_file(rule)).is_file():
                cached = sorted(path.read_text(encoding="utf-8") for path in (self.folder / RULES).glob("*.json"))
                raise DataError(
                    f"the cache {self.folder} is stale: group {group} resizes its images by {json.dumps(rule)}, the "
                    f"cache holds {'; '.join(cached) or 'no group'}.\n"
                    "  Run echo4o data cache CONFIG --out with the same folder again, which adds what is missing, "
                    "restore the dataset YAML, or train without latent_cache."
                )


def read_identity(folder: Path) -> Identity:
    """Raises DataError if there is no store or it is of another version."""
    path = folder / IDENTITY
    try:
        return Identity(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder.parent} holds no cache ({path} is missing). Make it first: echo4o data cache CONFIG --out "
            f"{folder.parent}; or train without latent_cache."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove {folder} and make the cache anew") from error


@dataclass(frozen=True)
class LatentCache:
    """The stores that a run uses.

    Attributes:
        stores: by kind of image.
        strict: an image that is not in its store ends the run.
    """

    stores: Mapping[str, LatentStore]
    strict: bool = False

    def find(self, kind: str, content: bytes, size: tuple[int, int]) -> Tensor | None:
        """The tensor of an image, or None; see `LatentStore.find`."""
        store = self.stores.get(kind)
        return None if store is None else store.find(content, size)

    def missing(self, kind: str, where: str, size: Sequence[int]) -> DataError:
        """The error of a strict run that misses an image."""
        return DataError(
            f"latent_cache_strict: an image of {where}, {size[0]} × {size[1]} px after resizing, is not in "
            f"{self.stores[kind].folder}.\n"
            "  Run echo4o data cache CONFIG --out with the same folder again, which adds what is missing, or set "
            "latent_cache_strict False to encode such images as they come."
        )
