"""No result takes the place of something it is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from echo4o.generate.item import Item, RequestError
from echo4o.generate.results import LOCK, RESULTS


def check_overwriting(outputs: Iterable[Path], inputs: Iterable[Path], remedy: str) -> None:
    """Compares files, not names: links and letter case make no difference.

    Raises:
        RequestError: if an output is one of the inputs.
    """
    known = {_identity(path): path for path in inputs}
    known.pop(None, None)
    for output in outputs:
        if (identity := _identity(output)) in known:
            raise RequestError(f"{output} would overwrite {known[identity]}, which is read: {remedy}")


def files_of_requests(items: Sequence[Item], out: Path, world_size: int) -> list[Path]:
    """All that a run of requests may write into `out`."""
    own = [RESULTS, LOCK, *(f"results.{rank}.jsonl" for rank in range(world_size))]
    return [out / name for name in (*own, *(name for item in items for name in (*item.file_names, f"{item.id}.txt")))]


def references_of(items: Iterable[Item]) -> list[Path]:
    return list(dict.fromkeys(image.path for item in items for image in item.images))


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file; None if there is none, which nothing can overwrite."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
