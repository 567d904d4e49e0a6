"""Which model `echo4o generate` and `echo4o app` load and where, looked at before minutes are spent on loading it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from echo4o.checkpoint.adapters import assets_of
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hub import local_folder
from echo4o.generate.files import model_fingerprint
from echo4o.generate.item import Item, RequestError, printable
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.runs import ModelName
from echo4o.launch import name_of_start
from echo4o.model import BagelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded; see `Echo4oPipeline.from_pretrained`."""

    folder: Path
    dtype: str = "auto"
    device: str = "auto"
    weights: str | None = None
    base: Path | None = None
    quantize: str | None = None
    offload: str | None = None
    compile: bool = False

    @property
    def is_on_gpu(self) -> bool:
        return torch.cuda.is_available() if self.device == "auto" else not self.device.startswith("cpu")

    @property
    def number_type(self) -> str:
        """``auto``: bfloat16 on a GPU, float32 on a CPU, which has no fast arithmetic in fewer bits."""
        return ("bfloat16" if self.is_on_gpu else "float32") if self.dtype == "auto" else self.dtype

    def check_device(self) -> None:
        """Raises RequestError if this machine has no such device."""
        if self.device == "auto" and not torch.cuda.is_available():
            return
        name = "cuda" if self.device == "auto" else self.device
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RequestError(f"--device is {name}; use auto, cpu, cuda or cuda:N") from error
        if device.type == "meta":
            raise RequestError(f"--device is {name}, which computes nothing; use auto, cpu, cuda or cuda:N")
        if device.type != "cuda":
            return
        if not torch.cuda.is_available():
            raise RequestError(f"--device is {name}, but torch finds no CUDA GPU here; use --device cpu")
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= (count := torch.cuda.device_count()):
            raise RequestError(f"there is no GPU cuda:{index}, only {count} of them, counted from 0")

    def size_check(self) -> SizeCheck:
        """For requests, from the model's config; one that lets everything pass where there is none to be read yet."""
        if not self.folder.is_dir():
            return SizeCheck()
        try:
            config = BagelConfig.from_pretrained(assets_of(self.folder, self.base))
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            logger.debug("sizes are not checked: %s", error)
            return SizeCheck()
        return SizeCheck(config.latent_downsample, config.max_latent_size * config.latent_downsample)

    def name(self) -> ModelName:
        """Raises FileNotFoundError or CheckpointError if there is no such model."""
        folder = local_folder(self.folder)
        fingerprint = model_fingerprint(folder, self.weights, self.base)
        name = self.folder.resolve().name if folder == self.folder else self.folder.as_posix()
        return ModelName(printable(name), fingerprint, self.number_type, self.quantize)

    def load(self) -> Echo4oPipeline:
        """On the GPU of this process, if torchrun has started several."""
        device = self.device
        if not Rank.from_environment().rank:
            logger.info("loading %s in %s", self.folder, self.quantize or self.number_type)
        if "LOCAL_RANK" in os.environ and self.is_on_gpu and device in ("auto", "cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        return Echo4oPipeline.from_pretrained(
            self.folder, dtype=self.number_type, device=device, weights=self.weights, base=self.base,
            quantize=self.quantize, offload=self.offload, compile=self.compile,
        )  # fmt: skip


@dataclass(frozen=True)
class SizeCheck:
    """Whether a model can draw in the size that a request states.

    Attributes:
        stride: sides are multiples of it; 0 if nothing is known.
        limit: longest side.
    """

    stride: int = 0
    limit: int = 0

    def __call__(self, item: Item) -> None:
        """Raises RequestError if not."""
        if not self.stride or item.understand or item.height is None or item.width is None:
            return
        size = (item.height, item.width)
        if any(side % self.stride or side > self.limit for side in size):
            raise RequestError(
                f"output size {size[0]} × {size[1]} (height × width): both must be multiples of {self.stride} "
                f"up to {self.limit}, the model's position table"
            )


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun has started.

    Attributes:
        run: the same for all of one start, and for no other start.
    """

    rank: int
    world_size: int
    run: str = ""

    @classmethod
    def from_environment(cls) -> Rank:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        parts = [os.environ.get(name, "") for name in names]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            parts.append(name_of_start())  # the id may be "none" and the port a fixed one
        return cls(int(os.environ.get("RANK", "0")), world_size, " ".join(parts))
