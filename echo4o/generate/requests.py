"""Requests in a file, a JSON object a line; all of them are checked before a model is loaded.

{"id": "cat", "prompt": "The cat of <image 1> on the sofa of <image 2>.", "images": ["cat.jpg", "sofa.png"]}
{"prompt": "What is on the picture?", "images": ["cat.jpg"], "understand": true}
{"elements": [{"image": "cat.jpg"}, "becomes", {"image": "sofa.png"}, "in the same style"], "num_timesteps": 30}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo4o.data.errors import RowError
from echo4o.data.images import open_image
from echo4o.generate.item import ImageFile, Item, RequestError, item_of

SHOWN_PROBLEMS = 20
_READERS = 8


def read_requests(
    path: str | Path,
    defaults: Mapping[str, Any] | None = None,
    seed: int = 0,
    check: Callable[[Item], object] = lambda item: None,
) -> tuple[list[Item], list[str]]:
    """Every request of a JSONL file, in order, and one message for each line that cannot be used.

    Args:
        path: image paths in it are relative to its folder.
        defaults: values by key, for the lines that do not state them.
        seed: with its id, the seed of a line without one of its own: the first four bytes of
            SHA-256("{seed}:{id}"), so that other lines do not change it.
        check: raises RequestError for what the model cannot do.

    Raises:
        FileNotFoundError, OSError: if the file cannot be read.
    """
    path = Path(path)
    found: list[tuple[int, Item]] = []
    problems: dict[int, str] = {}
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = {**(defaults or {}), **_stated(_json_object(line))}
            identity = str(values.setdefault("id", f"{number:05d}"))
            values.setdefault("seed", derived_seed(seed, identity))
            item = item_of(values, path.parent)
            check(item)
            found.append((number, item))
        except RequestError as error:
            problems[number] = str(error)
    problems |= _clashes(found)
    checked = _with_images([(number, item) for number, item in found if number not in problems], problems)
    return checked, [f"line {number}: {problems[number]}" for number in sorted(problems)]


def single_request(values: Mapping[str, Any]) -> Item:
    """The request of a command line; image paths are relative to the current folder.

    Raises:
        RequestError: if it cannot be run.
    """
    item = item_of({"id": "out", "seed": 0, **values}, Path())
    problems: dict[int, str] = {}
    checked = _with_images([(0, item)], problems)
    if problems:
        raise RequestError(problems[0])
    return checked[0]


def summary_of(problems: Sequence[str], path: str | Path) -> str:
    """One message for all lines that cannot be used."""
    shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"  … and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(
        [f"{path}: {len(problems)} lines cannot be used; mend them, or leave them out with --skip-bad", *shown]
    )


def derived_seed(seed: int, identity: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:4], "big")


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode())
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError('a request is a JSON object, such as {"prompt": "A red cube"}')
    return values


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without null: a key without a value is as good as absent."""
    return {key: value for key, value in values.items() if value is not None}


def _clashes(found: Iterable[tuple[int, Item]]) -> dict[int, str]:
    """Requests that would write a file of an earlier one."""
    owners: dict[str, int] = {}
    problems = {}
    for number, item in found:
        names = {f"{item.id}.txt", *item.file_names}
        taken = next((owners[name] for name in sorted(names) if name in owners), None)
        if taken is not None:
            problems[number] = f"id {item.id!r} would overwrite the files of line {taken}; give every line its own id"
            continue
        owners |= dict.fromkeys(names, number)
    return problems


def _with_images(found: Sequence[tuple[int, Item]], problems: dict[int, str]) -> list[Item]:
    """Items whose images can be decoded, with hashes and sizes; the others are added to `problems`."""
    paths = list(dict.fromkeys(image.path for _, item in found for image in item.images))
    with ThreadPoolExecutor(_READERS) as pool:
        looked_at = dict(zip(paths, pool.map(_look_at, paths), strict=True))
    usable = []
    for number, item in found:
        images = [looked_at[image.path] for image in item.images]
        if bad := [image for image in images if isinstance(image, str)]:
            problems[number] = bad[0]
        else:
            usable.append(replace(item, images=tuple(images)))
    return usable


def _look_at(path: Path) -> ImageFile | str:
    """The image, or why it cannot be used."""
    try:
        content = path.read_bytes()
        image = open_image(content)
    except RowError as error:
        return f"{error.reason}: {path}; give another picture"
    except OSError as error:
        return f"image {path} cannot be read ({error.strerror}); check its path"
    return ImageFile(path, hashlib.sha256(content).hexdigest(), image.size)
