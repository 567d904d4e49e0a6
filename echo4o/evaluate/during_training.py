"""The same few requests drawn again and again while a run trains, so that one sees what it learns.

::

    results/samples/
      index.html          all steps beside each other, newest first
      references/         small copies of the references
      0000200/
        cat.png …         pictures, with their settings inside
        sheet.png         references and pictures on one sheet
        step.json         prompts, names and losses, from which the page is made
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from echo4o.config import ConfigError
from echo4o.data.errors import RowError
from echo4o.data.images import open_image
from echo4o.data.tokenizer import Tokenizer
from echo4o.evaluate.sample_page import page_html
from echo4o.generate.batches import Drawn, requests_of
from echo4o.generate.contact_sheet import Row, write_contact_sheet
from echo4o.generate.files import partial_name, write_picture
from echo4o.generate.item import Item
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.request import Request
from echo4o.generate.requests import SHOWN_PROBLEMS, read_requests
from echo4o.generate.runs import ModelName, metadata_of
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder

logger = logging.getLogger(__name__)

SHEET, STEP_FILE, PAGE = "sheet.png", "step.json", "index.html"
REFERENCES, EARLIER = "references", "earlier"
_REFERENCE_SIDE = 256


@dataclass(frozen=True)
class Answer:
    """What came of one request: pictures by file name, and text (a thought or an answer), or why there is nothing."""

    item: Item
    drawn: tuple[tuple[str, Drawn], ...] = ()
    text: str = ""
    problem: str = ""


class RequestSampler:
    """See `echo4o.train.evaluating.Sampler`.

    References are read once, here: later evaluations need no file.

    Args:
        requests: JSONL; see `echo4o.generate.requests`.
        name: of the run, for the page and inside of the pictures.

    Raises:
        ConfigError: if the file cannot be read, or a line of it cannot be used.
    """

    def __init__(self, requests: str | Path, name: str = "") -> None:
        path = Path(requests).expanduser()
        try:
            self.items, problems = read_requests(path)
            self._contents = {image.path: image.path.read_bytes() for item in self.items for image in item.images}
        except OSError as error:
            raise ConfigError(f"eval_requests is {path}, which cannot be read: {error}") from error
        if problems or not self.items:
            shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS]) or " (it has no lines)"
            raise ConfigError(f"eval_requests is {path}, which cannot be used; mend its lines:{shown}")
        self.name = name
        self.answers: list[Answer] = []

    def begin(self, folder: Path, step: int) -> None:
        """Write the references, and set aside what an earlier run drew at later steps. Raises OSError."""
        later = [path for number, path in step_folders(folder) if number > step or not step]
        for path in later:
            (folder / EARLIER).mkdir(exist_ok=True)
            shutil.rmtree(folder / EARLIER / path.name, ignore_errors=True)
            os.replace(path, folder / EARLIER / path.name)
        (folder / REFERENCES).mkdir(parents=True, exist_ok=True)
        for item in self.items:
            for name, image in zip(_reference_names(item), self._references(item), strict=True):
                image.thumbnail((_REFERENCE_SIDE, _REFERENCE_SIDE))
                image.save(folder / REFERENCES / name)

    def draw(self, model: Bagel, vae: AutoEncoder | None, tokenizer: Tokenizer) -> Iterator[None]:
        """One request after the other, each the same noise at every step; a request that cannot be drawn warns."""
        pipe = Echo4oPipeline.around(model, "", tokenizer=tokenizer, vae=vae)
        self.answers = []
        for item in self.items:
            try:
                self.answers.append(self._drawn(pipe, item))
            except (ValueError, RowError) as error:
                # What the request says is wrong for this model; all ranks find it before any forward pass.
                logger.warning("request %s of eval_requests: %s", item.id, error)
                self.answers.append(Answer(item, problem=str(error)))
            yield

    def write(self, folder: Path, step: int, losses: Mapping[str, float]) -> dict[str, Image.Image]:
        """The step's folder, complete or absent, and the page. Raises OSError."""
        target = folder / f"{step:07d}"
        partial = partial_name(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pictures: dict[str, Image.Image] = {}
        model = ModelName(f"{self.name} step {step}".strip(), "", "")
        for answer in self.answers:
            for name, drawn in answer.drawn:
                assert drawn.image is not None
                write_picture(drawn.image, partial / name, metadata_of(answer.item, drawn, model))
                pictures[Path(name).stem] = drawn.image
        write_contact_sheet([self._sheet_row(answer) for answer in self.answers], partial / SHEET)
        content = {
            "step": step,
            "losses": dict(losses),
            "requests": [_told(answer) for answer in self.answers],
        }
        (partial / STEP_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        write_page(folder, self.name)
        return pictures

    def _drawn(self, pipe: Echo4oPipeline, item: Item) -> Answer:
        output = pipe.batch([self._with_contents(request) for request in requests_of(item)])
        text = "\n".join(info["text"] for info in output.info if info["text"])
        if item.understand:
            return Answer(item, text=text)
        drawn = [Drawn(output.images[info["image"]], info, 0.0) for info in output.info]
        return Answer(item, tuple(zip(item.file_names, drawn, strict=True)), text)

    def _with_contents(self, request: Request) -> Request:
        elements = (self._contents[part] if isinstance(part, Path) else part for part in request.elements)
        return replace(request, elements=tuple(elements))

    def _references(self, item: Item) -> list[Image.Image]:
        return [open_image(self._contents[image.path]).convert("RGB") for image in item.images]

    def _sheet_row(self, answer: Answer) -> Row:
        item = answer.item
        results = [drawn.image for _, drawn in answer.drawn if drawn.image is not None]
        text = answer.text or answer.problem
        return Row(item.text, self._references(item), results, name=item.id, text=text)


def _told(answer: Answer) -> dict[str, Any]:
    """One request in ``step.json``."""
    return {
        "id": answer.item.id,
        "prompt": answer.item.text,
        "references": _reference_names(answer.item),
        "pictures": [name for name, _ in answer.drawn],
        "text": answer.text,
        "problem": answer.problem,
    }


def _reference_names(item: Item) -> list[str]:
    return [f"{item.id}_{number}.png" for number, _ in enumerate(item.images, start=1)]


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every evaluation in a run's ``samples``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def write_page(folder: Path, name: str = "") -> Path:
    """``index.html`` of a run's ``samples`` folder; steps whose ``step.json`` cannot be read are left out."""
    steps = []
    for _, path in step_folders(folder):
        try:
            steps.append(json.loads((path / STEP_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            logger.warning("%s is not on the page: %s", path, error)
    target = folder / PAGE
    partial = partial_name(target)
    partial.write_text(page_html(steps, name), encoding="utf-8")
    os.replace(partial, target)
    return target
