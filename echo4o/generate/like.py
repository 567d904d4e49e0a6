"""`--like`: what drew a picture, as values of the next request."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.generate.files import read_metadata, sha256_of
from echo4o.generate.item import RequestError

logger = logging.getLogger(__name__)


def values_like(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and what drew a picture where they say nothing.

    A preset in `values` takes the place of all old settings, a ``size_from`` that of the old size. References are
    `values`' images, else looked for beside the picture, under their old names; another prompt may have another number
    of them.

    Raises:
        RequestError: if a reference is missing.
        FileNotFoundError, ValueError: as `read_metadata`.
    """
    known = read_metadata(path)
    old = {key: known[key] for key in ("preset", "seed", "think", "inline")}
    if "preset" not in values:
        old |= known["settings"]
    if "size_from" not in values:
        old |= {key: known[key] for key in ("height", "width")}
    if "prompt" in values and "images" in values:
        if "size_from" not in values:
            old.pop("size_from", None)  # a number of the old references; the size is known
        return {**old, **values}
    files = _references_of(path, known["images"], [Path(image) for image in values.get("images", ())])
    if known["prompt"] is not None or "prompt" in values:
        return {**old, "prompt": known["prompt"], **values, "images": files}
    remaining = iter(files)
    elements = [part if isinstance(part, str) else {"image": next(remaining)} for part in known["elements"]]
    return {**old, **{key: value for key, value in values.items() if key != "images"}, "elements": elements}


def _references_of(path: Path, known: Sequence[Mapping[str, str]], given: Sequence[Path]) -> list[Path]:
    if given and len(given) != len(known):
        raise RequestError(f"{path} was drawn from {len(known)} references, not from {len(given)}")
    files = list(given) or [path.parent / image["image"] for image in known]
    for number, (file, image) in enumerate(zip(files, known, strict=True), start=1):
        if not file.is_file():
            names = ", ".join(image["image"] for image in known)
            raise RequestError(f"{file} is not there; say with --image where the references of {path} are: {names}")
        if sha256_of(file) != image["sha256"]:
            logger.warning("%s is not image %d that %s was drawn from: the result will differ", file, number, path)
    return files
