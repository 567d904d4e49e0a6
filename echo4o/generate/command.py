"""What `echo4o generate` does once its options are parsed: one request into a picture, or a file of them into a folder.

Under torchrun every process takes its share of the requests; they need no process group.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint.hub import local_folder
from echo4o.generate.batches import Drawer, Drawn, requests_of
from echo4o.generate.contact_sheet import MAX_ROWS, Row, check_picture_name, write_contact_sheet
from echo4o.generate.files import model_fingerprint, read_metadata, sha256_of, write_picture
from echo4o.generate.item import Item, RequestError, numbered
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.progress import RunProgress
from echo4o.generate.requests import read_requests, single_request, summary_of
from echo4o.generate.runs import GPU_BATCH_SIZE, ModelName, Summary, metadata_of, run_items, texts_of, write_text

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

    def name(self) -> ModelName:
        """Raises FileNotFoundError or CheckpointError if there is no such model."""
        folder = local_folder(self.folder)
        fingerprint = model_fingerprint(folder, self.weights, self.base)
        name = self.folder.resolve().name if folder == self.folder else self.folder.as_posix()
        return ModelName(name, fingerprint, self.number_type, self.quantize)

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
class Rank:
    """This process among those that torchrun has started."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Rank:
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


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
    if grid is not None:
        check_picture_name(grid)
    item = single_request(values_like(like, values) if like else values)
    out = _checked_out(out, item)
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
    names = numbered(out.name, item.num_images)
    for file_name, result in zip(names, drawn, strict=True):
        assert result.image is not None
        write_picture(result.image, out.with_name(file_name), metadata_of(item, result, name))
        say(str(out.with_name(file_name)))
    if grid is not None:
        pictures = [result.image for result in drawn if result.image is not None]
        labels = [f"result, seed {result.info['seed']}" for result in drawn]
        row = Row(item.text, [image.path for image in item.images], pictures, labels=labels, text=text)
        say(str(write_contact_sheet([row], grid)))
    return 0


def values_like(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and what drew a picture where they say nothing.

    References are `values`' images, else looked for beside the picture, under their old names.

    Raises:
        RequestError: if a reference is missing.
        FileNotFoundError, ValueError: as `read_metadata`.
    """
    known = read_metadata(path)
    old = {key: known[key] for key in ("preset", "seed", "height", "width", "think", "inline")} | known["settings"]
    if "prompt" in values:
        return {**old, **values}  # another prompt has its own references, if any
    files = _references_of(path, known["images"], [Path(image) for image in values.get("images", ())])
    if known["prompt"] is not None:
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


def _checked_out(out: Path | None, item: Item) -> Path | None:
    if out is None:
        return None if item.understand else Path("out.png")
    ending = ".txt" if item.understand else ".png"
    if out.suffix.lower() != ending:
        raise RequestError(
            f"--out is {out}; it must end in {ending}" + ("" if item.understand else ", which keeps how it was drawn")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


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
    if grid is not None:
        check_picture_name(grid)
    items, problems = read_requests(requests, defaults, seed)
    if problems and not skip_bad:
        raise RequestError(summary_of(problems, requests))
    if not items:
        raise RequestError(f"{requests} holds no request that can be run")
    if not ranks.rank:
        for problem in problems:
            logger.warning("%s, %s: left out", requests, problem)
    summary = run_items(
        items, out, model.load, model.name(), batch_size=batch_size or _default_batch_size(model), overwrite=overwrite,
        rank=ranks.rank, world_size=ranks.world_size,
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
