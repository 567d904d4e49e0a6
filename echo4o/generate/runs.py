"""Many requests into a folder: what is finished stays, what fails does not stop the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.generate.batches import Drawer, Drawn, batches_of, requests_of
from echo4o.generate.files import partial_name, settings_dict, write_picture
from echo4o.generate.item import Item, printable
from echo4o.generate.progress import RunProgress
from echo4o.generate.results import Record, Results

if TYPE_CHECKING:
    from echo4o.generate.pipeline import Echo4oPipeline

#: Requests at once on a GPU. One at a time keeps a CPU busy, and its results to the last bit.
GPU_BATCH_SIZE = 4


@dataclass(frozen=True)
class ModelName:
    """What of a model decides a picture: `model_fingerprint`, and how its numbers are held."""

    name: str
    hash: str
    dtype: str
    quantize: str | None = None


def fingerprint_of(item: Item, model: ModelName) -> str:
    """Changes with whatever may change the result; not with places and names of files."""
    content = {
        "parts": [part if isinstance(part, str) else {"image": item.images[part].sha256} for part in item.parts],
        "settings": settings_dict(item.settings),
        "numbers": [item.seed, item.height, item.width, item.num_images],
        "flags": [item.think, item.understand],
        "model": [model.hash, model.dtype, model.quantize],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def metadata_of(item: Item, drawn: Drawn, model: ModelName) -> dict[str, Any]:
    """What `read_metadata` will return."""
    images = [{"image": image.name, "sha256": image.sha256} for image in item.images]
    return {
        "version": version("echo4o"),
        "prompt": item.prompt,
        "images": images,
        "elements": [part if isinstance(part, str) else images[part] for part in item.parts],
        "preset": item.preset,
        "settings": settings_dict(item.settings),
        **{key: drawn.info[key] for key in ("seed", "height", "width", "text")},
        "think": item.think,
        "inline": item.inline,
        "model": asdict(model),
    }


@dataclass
class Summary:
    """Of a run, over all ranks: counts, and message by id of what failed."""

    num_done: int
    num_skipped: int
    failed: dict[str, str]


def run_items(
    items: Sequence[Item],
    out: Path,
    load: Callable[[], Echo4oPipeline],
    model: ModelName,
    *,
    batch_size: int = 1,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    run: str = "",
) -> Summary | None:
    """Draw and answer what is not in `out` yet; ranks take whole batches in turn.

    Args:
        load: gives the pipeline; not called if this rank has nothing to do.
        run: see `Results`.

    Returns:
        The summary, on the rank that ends last; None on the others.

    Raises:
        OSError: if `out` cannot be written, or another run writes into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = [overwrite, batch_size, [(item.id, fingerprint_of(item, model)) for item in items]]
    run = f"{run} {hashlib.sha256(json.dumps(content).encode()).hexdigest()}"
    wanted = {name for item in items for name in (*item.file_names, *_text_names(item))}
    references = {image.path for item in items for image in item.images}
    wanted |= {path.name for path in references if path.parent.resolve() == out.resolve()}
    with Results(out, rank, world_size, run) as results:
        known = results.read()
        batches = batches_of(items, batch_size)[rank::world_size]
        pending = [
            [item for item in batch if overwrite or not is_finished(item, known.get(item.id), out, model)]
            for batch in batches
        ]
        total = sum(map(len, pending))
        failed: dict[str, str] = {}
        pipe = load() if total else None
        with RunProgress(total, enabled=rank == 0) as progress:
            drawer = Drawer(pipe, batch_size, progress) if pipe is not None else None
            for batch in filter(None, pending):
                assert drawer is not None
                for item, outcome in zip(batch, _draw_batch(drawer, batch), strict=True):
                    files = _files_of(known.get(item.id))
                    if isinstance(outcome, list):
                        files += item.file_names
                        outcome = _written(item, outcome, out, model, results, known.get(item.id), wanted)
                    if outcome is None:
                        continue
                    failed[item.id] = printable(f"{type(outcome).__name__}: {outcome}")
                    progress.say(f"{item.id} failed: {failed[item.id]}")
                    results.add({"id": item.id, "error": failed[item.id], **({"files": files} if files else {})})
                progress.advance(len(batch))
        done = results.finish([item.id for item in items], failed, total - len(failed))
    if done is None:
        return None
    return Summary(done["num_done"], len(items) - done["num_done"] - len(done["failed"]), done["failed"])


def _draw_batch(drawer: Drawer, batch: Sequence[Item]) -> list[list[Drawn] | Exception]:
    """Pictures by item, or the first error of an item."""
    flat = iter(drawer([request for item in batch for request in requests_of(item)]))
    outcomes: list[list[Drawn] | Exception] = []
    for item in batch:
        own = [next(flat) for _ in range(item.num_images)]
        error = next((result for result in own if isinstance(result, Exception)), None)
        outcomes.append(error or [result for result in own if isinstance(result, Drawn)])
    return outcomes


def _written(
    item: Item, drawn: list[Drawn], out: Path, model: ModelName, results: Results, old: Record | None,
    wanted: Collection[str],
) -> Exception | None:  # fmt: skip
    """Write an item's files and its line; what kept it from being written, if it is of the item and not of the disk.

    Before a file is replaced, the line that vouched for it is: a run that is killed in between does the item again.
    """
    record = record_of(item, drawn, model)
    results.add({"id": item.id, "started": True, "files": list(dict.fromkeys([*_files_of(old), *record["files"]]))})
    try:
        write_item(item, drawn, out, model, old, wanted)
    except OSError:
        raise
    except Exception as error:
        return error
    results.add(record)
    return None


def _files_of(record: Record | None) -> list[str]:
    return list((record or {}).get("files", ()))


def _text_names(item: Item) -> list[str]:
    return [f"{item.id}.txt"] if item.understand or item.think else []


def is_finished(item: Item, record: Record | None, out: Path, model: ModelName) -> bool:
    """Whether the folder holds the result of this very request from this very model."""
    if record is None or record.get("fingerprint") != fingerprint_of(item, model):
        return False
    return all((out / name).is_file() for name in record["files"])


def record_of(item: Item, drawn: Sequence[Drawn], model: ModelName) -> dict[str, Any]:
    """A line of ``results.jsonl``."""
    info = drawn[0].info
    return {
        "id": item.id,
        "files": [*item.file_names, *([f"{item.id}.txt"] if texts_of(drawn) else [])],
        "prompt": item.text,
        "seed": item.seed,
        "height": info["height"],
        "width": info["width"],
        "preset": item.preset,
        "settings": settings_dict(item.settings),
        "seconds": round(sum(result.seconds for result in drawn), 3),
        "text": texts_of(drawn),
        "fingerprint": fingerprint_of(item, model),
    }


def texts_of(drawn: Sequence[Drawn]) -> str:
    """The answer, or the thoughts of an item's pictures where they differ."""
    return "\n\n".join(dict.fromkeys(result.info["text"] for result in drawn if result.info["text"]))


def write_item(
    item: Item, drawn: Sequence[Drawn], out: Path, model: ModelName, old: Record | None = None,
    wanted: Collection[str] = (),
) -> None:  # fmt: skip
    """Write an item's files, each whole or not at all, and remove those of an older result that it has no more.

    Args:
        wanted: names of files that stay, whatever the older result says.
    """
    for name, result in zip(item.file_names, drawn, strict=False):
        assert result.image is not None
        write_picture(result.image, out / name, metadata_of(item, result, model))
    if text := texts_of(drawn):
        write_text(out / f"{item.id}.txt", text)
    kept = {*item.file_names, *([f"{item.id}.txt"] if text else [])}
    for name in set(_files_of(old)) - kept - set(wanted):
        (out / Path(name).name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 with a newline at its end; the name appears when the file is whole."""
    partial = partial_name(path)
    partial.write_text(f"{text}\n", encoding="utf-8")
    os.replace(partial, path)
