"""What `echo4o generate` does once its options are parsed: one request into a picture, or a file of them into a folder.

Under torchrun every process takes its share of the requests; they need no process group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echo4o.generate.batches import Drawer, Drawn, requests_of
from echo4o.generate.contact_sheet import MAX_ROWS, Row, check_picture_name, write_contact_sheet
from echo4o.generate.files import read_metadata, write_picture
from echo4o.generate.item import Item, RequestError, numbered
from echo4o.generate.like import values_like
from echo4o.generate.options import ModelOptions, Rank
from echo4o.generate.overwriting import check_overwriting, files_of_requests, references_of
from echo4o.generate.progress import RunProgress
from echo4o.generate.requests import read_requests, single_request, summary_of
from echo4o.generate.runs import GPU_BATCH_SIZE, Summary, metadata_of, run_items, texts_of, write_text

__all__ = ["ModelOptions", "generate", "generate_many", "generate_one"]

logger = logging.getLogger(__name__)


def generate(
    model: ModelOptions,
    values: Mapping[str, Any],
    *,
    out: Path | None = None,
    grid: Path | None = None,
    requests: Path | None = None,
    like: Path | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    batch_size: int | None = None,
    say: Callable[[str], object] = print,
) -> int:
    """One request, or the requests of a file.

    Args:
        values: options of a request by name, only those that were given; ``size_from`` and ``cfg_interval`` as text.

    Returns:
        The exit status.

    Raises:
        RequestError: for options that do not go together; else as `generate_one` and `generate_many`.
    """
    values = {name: _parsed(name, value) for name, value in values.items()}
    model.check_device()
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"--batch-size is {batch_size}; it must be at least 1")
    if requests is None:
        if unfit := [flag for flag, is_given in (("--skip-bad", skip_bad), ("--overwrite", overwrite)) if is_given]:
            raise RequestError(f"{unfit[0]} goes with --requests FILE")
        return generate_one(model, values, out=out, grid=grid, like=like, batch_size=batch_size, say=say)
    if unfit := [name for name in ("prompt", "images") if name in values] + (["like"] if like else []):
        raise RequestError(f"--{unfit[0].removesuffix('s')} and --requests exclude each other: it belongs in the file")
    if out is None or out.suffix in (".png", ".txt"):
        raise RequestError("--requests needs --out FOLDER for its results")
    seed = values.pop("seed", 0)
    return generate_many(
        model, requests, out, values, seed=seed, grid=grid, batch_size=batch_size, skip_bad=skip_bad,
        overwrite=overwrite, say=say,
    )  # fmt: skip


def _parsed(name: str, value: Any) -> Any:
    if name == "size_from" and str(value).isdigit():
        return int(value)
    if name != "cfg_interval":
        return value
    try:
        low, high = map(float, value.split(","))
    except ValueError as error:
        raise RequestError(f"--cfg-interval is {value}; it must be two times, e.g. 0.4,1.0") from error
    return low, high


# ---------------------------------------------------------------- one request


def generate_one(
    model: ModelOptions,
    values: Mapping[str, Any],
    *,
    out: Path | None = None,
    grid: Path | None = None,
    like: Path | None = None,
    batch_size: int | None = None,
    say: Callable[[str], object] = print,
) -> int:
    """One request: its pictures into `out`, its answer or thought through `say`.

    Args:
        values: keys as in a JSONL line; image paths are relative to the current folder.
        out: ``out.png`` by default, for several pictures ``out_0.png``, …; a .txt for an answer.
        like: a picture whose prompt, settings, seed and size hold where `values` says nothing.

    Returns:
        The exit status.

    Raises:
        RequestError, ValueError, OSError: with the remedy.
    """
    if Rank.from_environment().rank:
        return 0  # one picture is no work for several processes
    item = single_request(values_like(like, values) if like else values)
    model.size_check()(item)
    out = _checked_out(out, item)
    outputs = [out.with_name(name) for name in numbered(out.name, item.num_images)] if out is not None else []
    _check_grid(grid, [*references_of([item]), *outputs])
    check_overwriting(outputs, references_of([item]), "choose another --out")
    name = model.name()
    if like and (drawn_by := read_metadata(like)["model"]) != asdict(name) | {"name": drawn_by["name"]}:
        logger.warning("%s was drawn by another model, dtype or quantization: the result will differ", like)
    pipe = model.load()
    with RunProgress(1) as progress:
        outcomes = Drawer(pipe, batch_size or _default_batch_size(model), progress)(requests_of(item))
    drawn = [_result(outcome) for outcome in outcomes]
    if text := texts_of(drawn):
        say(text)
    if item.understand:
        if out is not None:
            write_text(out, text)
        return 0
    assert out is not None
    for file, result in zip(outputs, drawn, strict=True):
        assert result.image is not None
        write_picture(result.image, file, metadata_of(item, result, name))
        say(str(file))
    if grid is not None:
        pictures = [result.image for result in drawn if result.image is not None]
        labels = [f"result, seed {result.info['seed']}" for result in drawn]
        row = Row(item.text, [image.path for image in item.images], pictures, labels=labels, text=text)
        say(str(write_contact_sheet([row], grid)))
    return 0


def _checked_out(out: Path | None, item: Item) -> Path | None:
    if out is None:
        return None if item.understand else Path("out.png")
    ending = ".txt" if item.understand else ".png"
    if out.suffix.lower() != ending:
        raise RequestError(
            f"--out is {out}; it must end in {ending}" + ("" if item.understand else ", which keeps how it was drawn")
        )
    if out.is_dir():
        raise RequestError(f"--out is {out}, a folder; name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _check_grid(grid: Path | None, others: Sequence[Path]) -> None:
    """The contact sheet's name, before anything is loaded for it; its folder is made."""
    if grid is None:
        return
    check_picture_name(grid)
    if grid.is_dir():
        raise RequestError(f"--grid is {grid}, a folder; name a file")
    if any(grid.absolute() == other.absolute() for other in others):
        raise RequestError(f"--grid is {grid}, which is a reference or a result: choose another name")
    check_overwriting([grid], others, "choose another --grid")
    grid.parent.mkdir(parents=True, exist_ok=True)


def _result(outcome: Drawn | Exception) -> Drawn:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


# ---------------------------------------------------------------- a file of requests


def generate_many(
    model: ModelOptions,
    requests: Path,
    out: Path,
    defaults: Mapping[str, Any],
    *,
    seed: int = 0,
    grid: Path | None = None,
    batch_size: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
) -> int:
    """The requests of a JSONL file into a folder; what is finished there is kept.

    Args:
        defaults: values for lines that do not state them.
        seed: of lines without one, with their ids (`read_requests`).
        skip_bad: leave out lines that cannot be used.

    Returns:
        The exit status: 1 if a request has failed.

    Raises:
        RequestError: naming the lines that cannot be used.
        ValueError, OSError: with the remedy.
    """
    ranks = Rank.from_environment()
    items, problems = read_requests(requests, defaults, seed, model.size_check())
    if problems and not skip_bad:
        raise RequestError(summary_of(problems, requests))
    if not items:
        raise RequestError(f"{requests} holds no request that can be run")
    inputs, outputs = [requests, *references_of(items)], files_of_requests(items, out, ranks.world_size)
    _check_grid(grid, [*inputs, *outputs])
    check_overwriting(outputs, inputs, "choose another --out, or another id for that line")
    if not ranks.rank:
        for problem in problems:
            logger.warning("%s, %s: left out", requests, problem)
    summary = run_items(
        items, out, model.load, model.name(), batch_size=batch_size or _default_batch_size(model), overwrite=overwrite,
        rank=ranks.rank, world_size=ranks.world_size, run=ranks.run,
    )  # fmt: skip
    if summary is None:
        return 0  # another process is still at work and will report
    say(_report(summary, len(problems), out))
    if grid is not None:
        say(str(write_contact_sheet(_rows(items, out, summary), grid)))
        if len(items) > MAX_ROWS:
            say(f"(the first {MAX_ROWS} of {len(items)} requests)")
    return 1 if summary.failed else 0


def _report(summary: Summary, num_bad: int, out: Path) -> str:
    parts = [f"{summary.num_done} done"]
    parts += [f"{summary.num_skipped} were finished before"] if summary.num_skipped else []
    parts += [f"{num_bad} lines left out"] if num_bad else []
    parts += [f"{len(summary.failed)} failed"] if summary.failed else []
    failures = [f"  {name}: {message}" for name, message in summary.failed.items()]
    return "\n".join([f"{', '.join(parts)}; see {out / 'results.jsonl'}", *failures])


def _rows(items: Sequence[Item], out: Path, summary: Summary) -> list[Row]:
    rows = []
    for item in [item for item in items if item.id not in summary.failed][:MAX_ROWS]:
        text_file = out / f"{item.id}.txt"
        text = text_file.read_text(encoding="utf-8") if text_file.is_file() else ""
        results = [out / name for name in item.file_names]
        labels = [f"result, seed {item.seed + i}" for i in range(len(results))]
        rows.append(Row(item.text, [image.path for image in item.images], results, item.id, labels, text))
    return rows


def _default_batch_size(model: ModelOptions) -> int:
    return GPU_BATCH_SIZE if model.is_on_gpu else 1
