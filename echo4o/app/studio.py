"""What happens when somebody presses Generate: one job at a time, its progress, its end, its results."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo4o.app.parameters import Limits, answer_keywords, chosen_seed, number_of, pipeline_keywords
from echo4o.data.errors import RowError
from echo4o.data.images import probe_size
from echo4o.data.sources.references import split_inline
from echo4o.generate.batches import Drawn
from echo4o.generate.files import sha256_of, write_picture
from echo4o.generate.item import ImageFile, item_of
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.runs import ModelName, metadata_of

Report = Callable[[int, int | None, str], object]
"""Called with what is done, of how much (None: not known) and in which unit."""


class Cancelled(Exception):
    """The user has pressed Cancel, or has gone."""


@dataclass(frozen=True)
class Job:
    """What is asked.

    Attributes:
        task: ``t2i``, ``multi_ref``, ``edit`` or ``understand``.
        prompt: or question.
        references: paths, in order.
        values: of the tab's parameters, by control name.
    """

    task: str
    prompt: str
    references: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        job: one that gives exactly this again.
        picture: path of a PNG; None if the job was a question.
        size: (width, height) of the picture in pixels.
        text: answer or thought, "" if there is none.
        seconds: of the whole run, however many pictures it drew.
    """

    job: Job
    picture: str | None
    size: tuple[int, int] | None
    text: str
    seconds: float

    @property
    def seed(self) -> int:
        return self.job.values["seed"]


class Studio:
    """Runs jobs on a pipeline, one at a time; every session can cancel its own.

    Pictures lie in a temporary folder that goes with the studio. They hold the metadata of `echo4o generate`.

    Args:
        model: for the metadata.
    """

    def __init__(self, pipe: Echo4oPipeline, model: ModelName) -> None:
        self.pipe, self.model, self.limits = pipe, model, Limits.of(pipe)
        self._folder = tempfile.TemporaryDirectory(prefix="echo4o_app_", ignore_cleanup_errors=True)
        self._one_at_a_time = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}
        self._pictures = 0

    def begin(self, session: str) -> None:
        """A new job of this session, which may have to wait for its turn: what was cancelled before is forgotten."""
        if session not in self._cancelled or self._cancelled[session].is_set():
            self._cancelled[session] = threading.Event()

    def cancel(self, session: str) -> None:
        """End the session's jobs, running or waiting, at the next step or word."""
        if session in self._cancelled:
            self._cancelled[session].set()

    def leave(self, prefix: str) -> None:
        """End all jobs of sessions whose name begins so: the page was closed."""
        for session in [name for name in self._cancelled if name.startswith(prefix)]:
            self._cancelled.pop(session).set()

    def run(self, job: Job, session: str = "", report: Report = lambda done, total, unit: None) -> list[Result]:
        """Results of a job: one for each picture, or the answer.

        Raises:
            Cancelled: if the session asked for it.
            ValueError, TypeError, OSError: for what the user can mend.
        """
        check = self._cancelled.setdefault(session, threading.Event())
        with self._one_at_a_time:
            start = time.perf_counter()
            with self._watched(job, check, report) as stage:
                stage.raise_if_cancelled()
                if job.task == "understand":
                    return [self._answer(job, start)]
                return self._draw(job, start, stage)

    def _draw(self, job: Job, start: float, stage: _Stage) -> list[Result]:
        _check(job)
        seed, number = chosen_seed(job.values), number_of(job.values, "num_images")
        keywords = self._with_size(job, pipeline_keywords(job.values, self.limits))
        out = self.pipe(
            job.prompt,
            job.references,
            preset=job.task,
            seed=seed,
            num_images=number,
            on_step=stage.on_step,
            **keywords,
        )
        seconds = time.perf_counter() - start
        results = []
        for info in out.info:
            picture = self._saved(job, Drawn(out.images[info["image"]], info, seconds / number), keywords)
            size = (info["width"], info["height"])
            results.append(Result(_exactly(job, info["seed"]), picture, size, info["text"], seconds))
        return results

    def _with_size(self, job: Job, keywords: dict[str, Any]) -> dict[str, Any]:
        """Of "as image N", the size: the pipeline counts references as they are read, and a placeholder moves them."""
        if not isinstance(keywords.get("size_from"), int):
            return keywords
        number, count = keywords.pop("size_from"), len(job.references)
        if not 1 <= number <= count:
            raise ValueError(f"Size is as image {number}, but the last image is image {count}: choose another size")
        width, height = self.pipe.vae_transform.target_size(*probe_size(job.references[number - 1]))
        return {**keywords, "width": width, "height": height}

    def _answer(self, job: Job, start: float) -> Result:
        _check(job)
        seed, keywords = chosen_seed(job.values), answer_keywords(job.values)
        keywords |= {"preset": "understand", "understand": True, "seed": seed}
        request = self.pipe.prompt_request(job.prompt, job.references, **keywords)
        answer = self.pipe.batch([request]).info[0]["text"]  # may be empty: a model may have nothing to say
        return Result(_exactly(job, seed), None, None, answer, time.perf_counter() - start)

    def _saved(self, job: Job, drawn: Drawn, keywords: Mapping[str, Any]) -> str:
        """Path of the picture as PNG, with what `echo4o generate --like` needs inside."""
        assert drawn.image is not None
        self._pictures += 1
        name = f"echo4o_{self._pictures:04}_seed{drawn.info['seed']}"
        images, own = [str(path) for path in job.references], {"id": name, "seed": drawn.info["seed"]}
        item = item_of({"prompt": job.prompt, "images": images, "preset": job.task, **own, **keywords}, Path())
        item = replace(item, images=tuple(ImageFile(image.path, sha256_of(image.path)) for image in item.images))
        path = Path(self._folder.name) / f"{name}.png"
        write_picture(drawn.image, path, metadata_of(item, drawn, self.model))
        return str(path)

    @contextmanager
    def _watched(self, job: Job, check: threading.Event, report: Report) -> Iterator[_Stage]:
        """While it lasts, every forward pass of the model can end the job: text is written without `on_step`."""
        stage = _Stage(check, report, writes=job.task == "understand" or bool(job.values.get("think")))
        first = self.pipe.model.language_model.model.embed_tokens  # every pass goes through it, however it is loaded
        handle = first.register_forward_pre_hook(stage.on_pass)
        try:
            yield stage
        finally:
            handle.remove()


class _Stage:
    """Where a job is: reading references, writing (only if `writes`), drawing."""

    def __init__(self, check: threading.Event, report: Report, writes: bool) -> None:
        self.check, self.report, self.writes = check, report, writes
        self.passes = self.steps = 0

    def raise_if_cancelled(self) -> None:
        if self.check.is_set():
            raise Cancelled

    def on_step(self, done: int, total: int) -> None:
        self.steps = done
        self.raise_if_cancelled()
        self.report(done, total, "steps")

    def on_pass(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.raise_if_cancelled()
        if self.steps == 0:
            self.report(self.passes, None, "words" if self.writes else "reading")
        self.passes += 1


def _exactly(job: Job, seed: int) -> Job:
    """The job that gives one of the pictures again."""
    one = {"seed": seed, "random_seed": False}
    return replace(job, values={**job.values, **one, **({"num_images": 1} if "num_images" in job.values else {})})


def _check(job: Job) -> None:
    if job.task != "t2i" and not job.references:
        raise ValueError("Add an image first" if job.task == "edit" else "Add one or more images first")
    if not job.prompt.strip():
        raise ValueError("Ask a question" if job.task == "understand" else "Write a prompt")
    try:
        split_inline(job.prompt, len(job.references))
    except RowError as error:
        missing, count = error.detail.split(" in ")[0], len(job.references)
        there = "there is 1 image" if count == 1 else f"there are {count or 'no'} images"
        raise ValueError(f"The prompt names {missing}, but {there}: add the image, or change the number") from error
