"""One request as people write it: its keys, their types, and what they must not say."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from echo4o.data.errors import RowError
from echo4o.data.sources.references import split_inline
from echo4o.generate.presets import Settings, preset
from echo4o.generate.sampler import Guidance

#: `Echo4oPipeline.understand`'s; the thought before a picture may be longer.
ANSWER_TOKENS = 512
#: File names, with room for ``_{i}.png`` and a temporary ending (255 bytes on most file systems).
MAX_ID_BYTES = 200
_ID = re.compile(r"[\w][\w.\-+=@]*")

OWN_KEYS: Mapping[str, Any] = {
    "id": str | int,
    "prompt": str,
    "images": list,
    "elements": list,
    "preset": str,
    "seed": int,
    "height": int,
    "width": int,
    "num_images": int,
    "think": bool,
    "understand": bool,
    "inline": bool,
}
SETTING_KEYS: Mapping[str, Any] = {
    name: kind
    for owner in (Guidance, Settings)
    for name, kind in typing.get_type_hints(owner).items()
    if name in {f.name for f in fields(owner)} - {"guidance"}
}
KEYS: Mapping[str, Any] = {**OWN_KEYS, **SETTING_KEYS}


class RequestError(ValueError):
    """Requests that cannot be run; the message lists what is wrong with which line, and the remedy."""


@dataclass(frozen=True)
class ImageFile:
    """A reference: where it is, the hash of its bytes, and (width, height) upright."""

    path: Path
    sha256: str = ""
    size: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return printable(self.path.name)


@dataclass(frozen=True)
class Item:
    """One checked request.

    Attributes:
        id: names its files.
        prompt: None if `parts` is an order of its own.
        images: its references, in order.
        parts: texts, and places in `images`, in the order the model reads them.
        preset: the preset's name; settings: what was changed of it.
        seed: of the first picture; picture i of `num_images` uses seed + i.
    """

    id: str
    parts: tuple[str | int, ...]
    images: tuple[ImageFile, ...] = ()
    prompt: str | None = None
    preset: str = "t2i"
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    think: bool = False
    understand: bool = False
    inline: bool = True

    @property
    def text(self) -> str:
        """For people: the prompt, or the elements as one."""
        if self.prompt is not None:
            return self.prompt
        return " ".join(part if isinstance(part, str) else f"<image {part + 1}>" for part in self.parts)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of its pictures."""
        if self.understand:
            return ()
        return numbered(f"{self.id}.png", self.num_images)

    @property
    def elements(self) -> list[str | Path]:
        """As the pipeline takes them: a string is a text, a path an image."""
        return [part if isinstance(part, str) else self.images[part].path for part in self.parts]


def printable(text: str) -> str:
    """With escapes for what is no text: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def numbered(name: str, count: int) -> tuple[str, ...]:
    """``out.png`` for one picture; ``out_0.png``, ``out_1.png``, … for more."""
    stem, dot, ending = name.rpartition(".")
    return (name,) if count == 1 else tuple(f"{stem}_{i}{dot}{ending}" for i in range(count))


def item_of(values: Mapping[str, Any], folder: Path) -> Item:
    """Check keys, types and values of one request; whether images can be read is not looked at here.

    Raises:
        RequestError: for the first thing that is wrong, with the remedy.
    """
    for key, value in values.items():
        _check_key(key, value)
    prompt, elements = values.get("prompt"), values.get("elements")
    understand = values.get("understand", values.get("preset") == "understand")
    if not understand and values.get("preset") == "understand":
        raise RequestError("the preset understand draws nothing: leave understand out, or choose another preset")
    if (prompt is None) == (elements is None):
        raise RequestError("give a prompt (with images), or elements (texts and images in order): one of the two")
    identity = _checked_id(str(values["id"]))
    if elements is None:
        images = [_image_path(image, folder) for image in values.get("images", ())]
        parts = _placed(prompt or "", len(images), values.get("inline", True))
    else:
        if values.get("images"):
            raise RequestError('images stand among the elements, as {"image": path}; leave the key images out')
        parts, images = _listed(elements, folder)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise RequestError("there is no text; write a prompt")
    if any(isinstance(part, str) and printable(part) != part for part in parts):
        raise RequestError("the prompt holds characters that are no text (surrogates); write it as UTF-8")
    name = values.get("preset") or _default_preset(len(images), understand)
    settings = _settings(name, {key: value for key, value in values.items() if key in SETTING_KEYS}, understand)
    if isinstance(settings.size_from, int) and not 1 <= settings.size_from <= max(1, len(images)):
        raise RequestError(f"size_from is {settings.size_from}, but there are {len(images)} images")
    _check_numbers(values, understand)
    return Item(
        identity, tuple(parts), tuple(ImageFile(path) for path in images), prompt, name, settings, values["seed"],
        values.get("height"), values.get("width"), values.get("num_images", 1), values.get("think", False), understand,
        values.get("inline", True),
    )  # fmt: skip


def _check_numbers(values: Mapping[str, Any], understand: bool) -> None:
    height, width, count = values.get("height"), values.get("width"), values.get("num_images", 1)
    if (height is None) != (width is None):
        raise RequestError("give height and width together, or neither")
    if min(height or 1, width or 1) < 1:
        raise RequestError(f"height and width are {height} and {width}; they must be at least 1")
    if count < 1 or (understand and count > 1):
        raise RequestError(f"num_images is {count}; it must be at least 1 (and 1 for an answer in text)")
    if not 0 <= values["seed"] <= 2**63 - count:
        raise RequestError(f"seed is {values['seed']}; it must lie between 0 and 2^63 - {count}")


def _check_key(key: str, value: Any) -> None:
    if key not in KEYS:
        near = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1, cutoff=0.5)
        raise RequestError(
            f"unknown key {key!r}. " + (f"Did you mean {near[0]}?" if near else f"Known: {', '.join(KEYS)}")
        )
    if not _fits(value, KEYS[key]):
        raise RequestError(
            f"{key} is {json.dumps(value, ensure_ascii=False, default=str)}; it must be {_described(KEYS[key])}"
        )


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a key: an integer may stand for a float, a list for a tuple."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        is_list = isinstance(value, (list, tuple)) and len(value) == len(members)
        return is_list and all(_fits(v, member) for v, member in zip(value, members, strict=True))
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _described(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_described(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    return words[kind]


def _settings(name: str, overrides: dict[str, Any], understand: bool) -> Settings:
    if understand:
        overrides.setdefault("max_think_tokens", ANSWER_TOKENS)
    try:
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
        return preset(name).changed(**tuples)
    except ValueError as error:
        raise RequestError(str(error)) from error


def _default_preset(num_images: int, understand: bool) -> str:
    """As the pipeline chooses."""
    return "understand" if understand else {0: "t2i", 1: "edit"}.get(num_images, "multi_ref")


def _placed(prompt: str, num_images: int, inline: bool) -> list[str | int]:
    """Texts and places of images, as `Echo4oPipeline.prompt_request` puts them."""
    if not inline or "<image" not in prompt.lower():
        return [*range(num_images), prompt]
    try:
        return list(split_inline(prompt, num_images))
    except RowError as error:
        raise RequestError(
            f"{error}. Give as many images as the prompt names; inline false (--no-inline) reads it literally."
        ) from error


def _listed(elements: Sequence[Any], folder: Path) -> tuple[list[str | int], list[Path]]:
    parts: list[str | int] = []
    images: list[Path] = []
    for element in elements:
        if isinstance(element, str):
            parts.append(element)
        elif isinstance(element, dict) and set(element) == {"image"}:
            parts.append(len(images))
            images.append(_image_path(element["image"], folder))
        else:
            shown = json.dumps(element, ensure_ascii=False)
            raise RequestError(f'an element is {shown}; it must be a text or {{"image": path}}')
    return parts, images


def _image_path(value: Any, folder: Path) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise RequestError(f"an image is {json.dumps(value)}; it must be a path")
    return folder / Path(value).expanduser()


def _checked_id(identity: str) -> str:
    if not _ID.fullmatch(identity) or len(identity.encode()) > MAX_ID_BYTES:
        raise RequestError(
            f"id is {identity!r}; it names files: use letters, digits and _ . - + = @, "
            f"first a letter, digit or _, at most {MAX_ID_BYTES} bytes"
        )
    return identity
