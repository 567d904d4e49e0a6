"""From a benchmark's question to what is sent: pictures prepared as the protocol says, and a hash of all of it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from echo4o.data.errors import RowError
from echo4o.data.images import open_image
from echo4o.evaluate.benchmark import Item, JudgeImage, Question

#: Raised when what is sent for the same question changes.
VERSION = 1


class MissingPicture(Exception):
    """A picture of the question is absent or cannot be decoded."""


@dataclass(frozen=True)
class Task:
    """One question about one item.

    Attributes:
        pictures: drawn for the item, by number; None where one is missing.
        request: hash of everything that determines the question.
    """

    item: Item
    question: Question
    pictures: tuple[Path | None, ...]
    request: str

    @property
    def key(self) -> tuple[str, str]:
        return self.item.id, self.question.name

    @property
    def missing(self) -> str | None:
        """Which picture of the question is not there; None if all are."""
        for part in _images(self.question):
            path = _path(part, self.pictures)
            if path is None:
                return f"no picture of item {self.item.id}" + (f", number {part.number}" if part.number else "")
            for needed in (path, part.size_of):
                if needed is not None and not needed.is_file():
                    return f"{needed.name} is not there"
        return None

    def messages(self) -> list[dict[str, Any]]:
        """For chat completions; images as JPEG in data URLs.

        Raises:
            MissingPicture: if one is absent or cannot be decoded.
        """
        content: list[dict[str, Any]] = []
        for part in self.question.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            url = {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg(part, self.pictures)).decode()}"}
            content.append({"type": "image_url", "image_url": {**url, **_detail(part)}})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.question.system:
            messages.insert(0, {"role": "system", "content": self.question.system})
        return messages


class Hashes:
    """SHA-256 of files, each read once as long as it does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int], str] = {}

    def __call__(self, path: Path | None) -> str:
        """ "absent" for a file that is not there."""
        try:
            found = path.stat() if path is not None else None
        except OSError:
            found = None
        if path is None or found is None:
            return "absent"
        key = (path, found.st_size, found.st_mtime_ns)
        if key not in self._known:
            self._known[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._known[key]


def request_hash(question: Question, pictures: Sequence[Path | None], judge: str, hashes: Hashes) -> str:
    """Changes with text, rubric, schema, bytes and preparation of the images, and the judge's name."""
    parts: list[Any] = []
    for part in question.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        sizes = [part.max_pixels, part.max_side, part.stride, part.size_of and hashes(part.size_of)]
        parts.append({"image": hashes(_path(part, pictures)), "as": [*sizes, part.quality, part.detail]})
    content = [VERSION, judge, question.system, parts, question.answer.schema]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def jpeg(part: JudgeImage, pictures: Sequence[Path | None]) -> bytes:
    """An image of a question as it is sent: upright, RGB (transparent parts white), resized, JPEG.

    Raises:
        MissingPicture: if it is absent or cannot be decoded.
    """
    image = _opened(_path(part, pictures))
    size = prepared_size(part, image.size, None if part.size_of is None else _opened(part.size_of).size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=part.quality)
    return file.getvalue()


def prepared_size(part: JudgeImage, size: tuple[int, int], size_of: tuple[int, int] | None = None) -> tuple[int, int]:
    """(width, height) of an image after the preparation of `part`."""
    if size_of is not None:
        return size_of
    width, height = size
    if part.max_pixels is not None and width * height > part.max_pixels:
        scale = math.sqrt(part.max_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    if part.max_side is not None and max(width, height) > part.max_side:
        scale = part.max_side / max(width, height)
        width, height = round(width * scale), round(height * scale)
    stride = part.stride
    return max(stride, width // stride * stride), max(stride, height // stride * stride)


def _images(question: Question) -> list[JudgeImage]:
    return [part for part in question.parts if isinstance(part, JudgeImage)]


def _path(part: JudgeImage, pictures: Sequence[Path | None]) -> Path | None:
    if part.path != "result":
        return Path(part.path)
    return pictures[part.number] if part.number < len(pictures) else None


def _detail(part: JudgeImage) -> Mapping[str, str]:
    """Left out where it is the API's own choice: not every server knows the key."""
    return {} if part.detail == "auto" else {"detail": part.detail}


def _opened(path: Path | None) -> Image.Image:
    if path is None:
        raise MissingPicture("there is no picture")
    try:
        return open_image(path.read_bytes())
    except RowError as error:
        raise MissingPicture(f"{path.name}: {error.reason}") from error
    except OSError as error:
        raise MissingPicture(f"{path.name} cannot be read ({error.strerror})") from error
