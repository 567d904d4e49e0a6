"""Requests that run together: as many as fit, as alike as there are, and none that makes the others fail."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from echo4o.generate.item import Item, RequestError
from echo4o.generate.progress import RunProgress
from echo4o.generate.request import Request, sized_as_read

if TYPE_CHECKING:
    from echo4o.generate.pipeline import Echo4oPipeline

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "out of memory even alone: ask for a smaller --height and --width or fewer references, or load the model with "
    "--quantize or --offload"
)


@dataclass(frozen=True)
class Drawn:
    """One picture or answer; `seconds` is its share of the batch's."""

    image: Image.Image | None
    info: Mapping[str, Any]
    seconds: float


def requests_of(item: Item) -> list[Request]:
    """One request a picture, or the one for the answer."""
    settings = sized_as_read(item.settings, [part for part in item.parts if isinstance(part, int)])
    return [
        Request(tuple(item.elements), settings, item.height, item.width, item.think, item.understand, item.seed + i)
        for i in range(item.num_images)
    ]


class Drawer:
    """Requests in batches: one that runs out of memory is halved, one that fails is run one by one.

    Args:
        batch_size: requests at once; lowered for good where memory does not suffice.
    """

    def __init__(self, pipe: Echo4oPipeline, batch_size: int, progress: RunProgress) -> None:
        self.pipe, self.batch_size, self.progress = pipe, batch_size, progress

    def __call__(self, requests: Sequence[Request]) -> list[Drawn | Exception]:
        """What came of each; an error is that of the request alone."""
        results: list[Drawn | Exception] = []
        while len(results) < len(requests):
            results += self._chunk(requests[len(results) : len(results) + self.batch_size])
        return results

    def _chunk(self, requests: Sequence[Request]) -> list[Drawn | Exception]:
        error = None
        begun = time.monotonic()
        try:
            output = self.pipe.batch(requests, on_step=self.progress.step)
        except Exception as caught:
            if is_broken_device(caught):
                raise
            error = caught
        else:
            seconds = (time.monotonic() - begun) / len(requests)
            images = [None if info["image"] is None else output.images[info["image"]] for info in output.info]
            return [Drawn(image, info, seconds) for image, info in zip(images, output.info, strict=True)]
        if is_out_of_memory(error):
            _drop_frames(error)  # they hold the tensors of the failed run
            if len(requests) == 1:
                return [RequestError(_OUT_OF_MEMORY)]
            self.batch_size = len(requests) // 2
            self.progress.say(f"out of memory with {len(requests)} requests at once: {self.batch_size} from here on")
            return self(requests)
        if len(requests) == 1:
            logger.debug("a request failed", exc_info=error)
            return [error]
        return [result for request in requests for result in self._chunk([request])]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def is_broken_device(error: BaseException) -> bool:
    """After a fault on a GPU nothing more can be computed by this process."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _drop_frames(error: BaseException) -> None:
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches_of(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Requests that run together: alike in kind and number of tokens, and no more pictures than `batch_size`.

    They depend on the whole list only, not on ranks or on what is finished. One by one they keep their order.
    """
    if batch_size == 1:
        return [[item] for item in items]
    batches: list[list[Item]] = []
    room = 0
    for item in sorted(items, key=lambda item: (item.understand, item.think, -estimated_tokens(item))):
        if not batches or room < item.num_images or batches[-1][0].understand != item.understand:
            batches.append([])
            room = batch_size
        batches[-1].append(item)
        room -= item.num_images
    return batches


def estimated_tokens(item: Item) -> float:
    """About how many tokens a request takes, before anything is known of the model: for sorting only."""
    areas = [min(image.size[0] * image.size[1], 1024**2) for image in item.images]
    if item.height and item.width:
        drawn = item.height * item.width
    else:
        drawn = areas[-1] if areas else 1024**2
    texts = sum(len(part) for part in item.parts if isinstance(part, str)) / 4
    read = sum(areas) * (1 / 14**2 if item.understand else 1 / 14**2 + 1 / 16**2)
    return read + texts + (0 if item.understand else item.settings.guidance.num_branches * drawn / 16**2)
