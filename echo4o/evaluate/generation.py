"""Draws what a benchmark lacks, through the same machinery as `echo4o generate --requests`; or takes pictures that were
made elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import IMAGE_SUFFIXES, Benchmark, Item, find_image
from echo4o.evaluate.run_folder import RunFolder, RunFolderError, write_whole
from echo4o.generate import item as requests_item
from echo4o.generate.item import RequestError
from echo4o.generate.options import ModelOptions, Rank
from echo4o.generate.requests import SHOWN_PROBLEMS, derived_seed, read_requests
from echo4o.generate.runs import GPU_BATCH_SIZE, Summary, run_items

#: Sent by the machinery itself, or of one request only.
NOT_FOR_ALL = ("id", "prompt", "images", "elements", "seed", "num_images", "understand", "inline")


@dataclass(frozen=True)
class Drawing(requests_item.Item):
    """A request whose picture lies where the benchmark wants it."""

    name: str = ""

    @property
    def file_names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Adopted:
    """Of a folder of pictures made elsewhere: how many were found, and names that were not."""

    num_found: int
    missing: tuple[str, ...]


def merged_settings(benchmark: Benchmark, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's settings with the caller's in their place.

    Raises:
        RequestError: for a key that belongs to one request only, such as a prompt.
    """
    if unfit := [name for name in overrides if name in NOT_FOR_ALL]:
        raise RequestError(f"{unfit[0]} is the benchmark's own and cannot be set for all of it")
    settings = {**benchmark.settings, **overrides}
    if "size_from" in overrides and "height" not in overrides:  # a size that is stated would win
        settings.pop("height", None)
        settings.pop("width", None)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def draw(
    benchmark: Benchmark,
    items: Sequence[Item],
    run: RunFolder,
    model: ModelOptions,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Summary | None:
    """Draw what is not there yet; ranks of torchrun share the work.

    Args:
        settings: of `merged_settings`.
        seed: picture n of an item gets its own from SHA-256 of (seed, benchmark, item, n): neither sharding nor other
            items change it.

    Returns:
        The summary on the rank that ends last, None on the others.

    Raises:
        RequestError: naming items that cannot be drawn; RunFolderError: if the folder holds other pictures.
        OSError: if the folder cannot be written.
    """
    ranks = Rank.from_environment()
    name = model.name()
    run.claim(drawn_with(benchmark, settings, seed, name))
    drawings = requests_of(benchmark, items, run, settings, seed, model.size_check())
    if ranks.rank == 0:
        run.note(**drawn_with(benchmark, settings, seed, name))
        write_sidecars(benchmark, items, run)
    for folder in {(run.images / drawing.name).parent for drawing in drawings}:
        folder.mkdir(parents=True, exist_ok=True)
    return run_items(
        drawings, run.images, model.load, name, batch_size=batch_size or (GPU_BATCH_SIZE if model.is_on_gpu else 1),
        rank=ranks.rank, world_size=ranks.world_size, run=ranks.run,
    )  # fmt: skip


def drawn_with(benchmark: Benchmark, settings: Mapping[str, Any], seed: int, model: Any) -> dict[str, Any]:
    """Facts for ``run.json`` of pictures drawn here."""
    return {
        "benchmark": benchmark.name, "model": model.name, "fingerprint": model.hash, "dtype": model.dtype,
        "quantize": model.quantize, "settings": dict(settings), "seed": seed, "images_from": None,
    }  # fmt: skip


def requests_of(
    benchmark: Benchmark,
    items: Sequence[Item],
    run: RunFolder,
    settings: Mapping[str, Any],
    seed: int,
    check: Callable[[requests_item.Item], object] = lambda item: None,
) -> list[Drawing]:
    """One checked request a picture. They also lie in ``requests.jsonl``, for `echo4o generate --requests`."""
    names: dict[str, str] = {}
    lines = []
    for item in items:
        for number in range(item.num_images):
            identity = item.id if item.num_images == 1 else f"{item.id}_{number}"
            names[identity] = str(Path(benchmark.image_name(item, number)).with_suffix(".png"))
            line = {
                "id": identity, "prompt": item.prompt, "images": [str(path.resolve()) for path in item.references],
                "inline": False, "seed": derived_seed(seed, f"{benchmark.name}:{item.id}:{number}"),
            }  # fmt: skip
            lines.append(json.dumps({**settings, **line}, ensure_ascii=False) + "\n")
    write_whole(run.requests, "".join(lines))
    found, problems = read_requests(run.requests, check=check)
    if problems:
        shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        more = [f"  … and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        message = (
            f"{benchmark.title}: {len(problems)} pictures cannot be drawn (lines of {run.requests}); mend the data"
        )
        raise RequestError("\n".join([f"{message} or the settings", *shown, *more]))
    own = [field.name for field in fields(requests_item.Item)]
    return [Drawing(**{key: getattr(item, key) for key in own}, name=names[item.id]) for item in found]


def write_sidecars(benchmark: Benchmark, items: Sequence[Item], run: RunFolder) -> None:
    """What upstream's scorer wants beside the pictures."""
    for item in items:
        for name, content in benchmark.sidecars(item).items():
            target = run.images / name
            if isinstance(content, str):
                write_whole(target, content)
            elif not (target.is_file() and target.stat().st_size == content.stat().st_size):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(content, target)


def adopt(benchmark: Benchmark, items: Sequence[Item], run: RunFolder, folder: Path) -> Adopted:
    """Take pictures that were made elsewhere: links to them under ``images/``.

    A picture is looked for by the benchmark's own name (upstream's) and by the item's id, with any of
    `IMAGE_SUFFIXES`.

    Raises:
        RunFolderError: if the folder is not there, holds none of the pictures, or the run holds others.
    """
    if not folder.is_dir():
        raise RunFolderError(f"--images is {folder}, which is no folder; name the folder with the pictures")
    folder = folder.resolve()
    facts = {**dict.fromkeys(("model", "fingerprint", "dtype", "quantize", "seed")), "settings": {}}
    facts |= {"benchmark": benchmark.name, "images_from": str(folder)}
    run.claim(facts)
    found, missing = [], []
    for item in items:
        for number in range(item.num_images):
            name = benchmark.image_name(item, number)
            plain = item.id if item.num_images == 1 else f"{item.id}_{number}"
            source = find_image(folder, name) or find_image(folder, f"{plain}.png")
            if source is None:
                missing.append(name)
            if folder != run.images.resolve():
                _link(run.images / name, source)
            found += [source] if source is not None else []
    if not found:
        raise RunFolderError(
            f"{folder} holds none of the {len(missing)} pictures, such as {missing[0]} "
            f"({', '.join(IMAGE_SUFFIXES)} are looked for); is it the right folder?"
        )
    run.note(**facts)
    return Adopted(len(found), tuple(missing))


def _link(name: Path, source: Path | None) -> None:
    """Make `name`, with the source's suffix, a link to it; links of an earlier run under other suffixes go."""
    for suffix in IMAGE_SUFFIXES:
        old = name.with_suffix(suffix)
        if old.is_symlink():
            if source is not None and old.suffix == source.suffix and Path(os.readlink(old)) == source:
                return
            old.unlink()
        elif old.is_file():
            raise RunFolderError(f"{old} is a picture of its own, no link; choose another --out for --images")
    if source is not None:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.with_suffix(source.suffix).symlink_to(source)
