"""Evaluation while a run trains: validation losses, and pictures of a few fixed requests.

An evaluation leaves no trace in the training: the averaged weights are swapped in and back bit by bit, random
generators, train mode and gradients are as before, so that a run with ``eval_every`` writes the same checkpoints as one
without. What goes wrong in it (an unreadable row, a full disk, memory) is a warning. Of several ranks one that fails
amid a forward pass would leave the others waiting, so that there the run ends with its message.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from echo4o.checkpoint.rng import rng_state, set_rng_state
from echo4o.data.tokenizer import Tokenizer
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder
from echo4o.train.ema import EMA
from echo4o.train.engine import Engine
from echo4o.train.failures import PeerFailure
from echo4o.train.liveness import Liveness
from echo4o.train.metrics import PictureSink, read_metrics
from echo4o.train.setup import Run
from echo4o.train.validation import NOISIEST, TIMES

logger = logging.getLogger(__name__)

SAMPLES = "samples"
SECONDS = "eval/seconds"
#: Steps after which a model should do better than copying a reference.
PATIENCE = 100
#: Numbers that are exchanged at a time, so that a swap takes hardly any memory.
_SWAP_CHUNK = 1 << 24


class Sampler(Protocol):
    """Draws the same requests at every evaluation (`echo4o.evaluate.during_training`). All ranks call it alike."""

    def begin(self, folder: Path, step: int) -> None:
        """Rank 0, once: pictures of steps after `step` belong to an earlier run. Raises OSError."""
        ...

    def draw(self, model: Bagel, vae: AutoEncoder | None, tokenizer: Tokenizer) -> Iterator[None]:
        """Draw, request by request; what concerns a single request alone is a warning, not an error."""
        ...

    def write(self, folder: Path, step: int, losses: Mapping[str, float]) -> Mapping[str, Image.Image]:
        """Rank 0: files of what was drawn last; pictures by name, for the board. Raises OSError."""
        ...


class Stopped(Exception):
    """The run was asked to stop amid an evaluation."""


class Evaluator:
    """Evaluates a run every ``eval_every`` steps, before its first and after its last.

    Args:
        say: prints a line for people, on rank 0.
        should_stop: asked on all ranks alike; an evaluation is given up for a stop.
        sampler: draws ``eval_requests``; None: no pictures.
    """

    def __init__(
        self,
        run: Run,
        say: Callable[[str], None],
        liveness: Liveness,
        should_stop: Callable[[], bool],
        sampler: Sampler | None = None,
    ) -> None:
        self.run, self.say, self.liveness, self.should_stop = run, say, liveness, should_stop
        training = run.config.training
        self.every = training.eval_every
        self.sampler = sampler if self.every and training.eval_requests else None
        if self.every and training.eval_requests and sampler is None:
            logger.warning("eval_requests: train() was given no sampler to draw them; `echo4o train` has one")
        self.samples = Path(training.results_dir) / SAMPLES

    @property
    def is_idle(self) -> bool:
        return not self.every or (self.run.validation is None and self.sampler is None)

    def begin(self) -> None:
        """Before the first step, and where a resumed run was stopped before it could evaluate."""
        run = self.run
        if self.is_idle:
            return
        if self.sampler is not None and not run.engine.rank:
            with _survivable(run.step):
                self.sampler.begin(self.samples, run.step)
        if run.step % self.every == 0 and not run.engine.broadcast(self._is_known(run.step)):
            self.evaluate(run.step)

    def after(self, step: int) -> None:
        if not self.is_idle and (step % self.every == 0 or step == self.run.total_steps):
            self.evaluate(step)

    def _is_known(self, step: int) -> bool:
        """A resumed run: it was evaluated before it stopped (rank 0's answer counts)."""
        if self.run.engine.rank or not self.run.metrics_path.is_file():
            return False
        return any(SECONDS in record for record in read_metrics(self.run.metrics_path) if record["step"] == step)

    # ------------------------------------------------------------ one evaluation

    def evaluate(self, step: int) -> None:
        """Measure, draw, and write both."""
        started = time.perf_counter()
        with self.run.throughput.paused():
            try:
                with self._set_aside():
                    losses = self._measured(step)
                    self._draw(step)
            except Stopped:
                return
            except PeerFailure:
                raise
            except Exception as error:
                if self.run.engine.world_size > 1 or isinstance(error, torch.AcceleratorError):
                    logger.error("this happened in the evaluation at step %d; --eval_every 0 trains without any", step)
                    raise
                _forget_frames(error)
                logger.warning("the evaluation at step %d failed, training goes on: %s", step, _in_words(error))
                return
            if not self.run.engine.rank:
                self._write(step, losses, time.perf_counter() - started)

    def _measured(self, step: int) -> dict[str, float]:
        run = self.run
        if run.validation is None:
            return {}
        losses = run.validation.measure(run.engine, run.vae, lambda: self._goes_on(step))
        if losses is None:
            raise Stopped
        return losses

    def _draw(self, step: int) -> None:
        run = self.run
        if self.sampler is None:
            return
        model = run.engine.module
        with run.engine.autocast():
            for _ in self.sampler.draw(model, run.vae, run.tokenizer):  # type: ignore[arg-type]
                if not self._goes_on(step):
                    raise Stopped

    def _goes_on(self, step: int) -> bool:
        self.liveness.progress(step, "evaluation")
        return not self.should_stop()

    def _write(self, step: int, losses: dict[str, float], seconds: float) -> None:
        weights = "averaged" if self.run.config.training.eval_weights == "ema" else "trained"
        if losses:
            self.say(f"validation at step {step} ({weights} weights): {in_words(losses)}")
            if step >= PATIENCE:
                for warning in warnings_of(losses):
                    logger.warning("step %d: %s", step, warning)
        pictures: Mapping[str, Image.Image] = {}
        if self.sampler is not None:
            with _survivable(step):
                pictures = self.sampler.write(self.samples, step, losses)
                self.say(f"pictures of step {step}: {self.samples / 'index.html'}")
        for sink in self.run.sinks:
            with _survivable(step):
                sink.write(step, {**losses, SECONDS: seconds})
                if pictures and isinstance(sink, PictureSink):
                    sink.write_pictures(step, pictures)

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Everything that training depends on is afterwards as it was."""
        run = self.run
        modes = [(module, module.training) for module in run.engine.module.modules()]
        generators = rng_state()
        run.engine.module.eval()
        try:
            with torch.no_grad(), averaged(run.engine, run.ema, run.config.training.eval_weights == "ema"):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            set_rng_state(generators)


@contextlib.contextmanager
def averaged(engine: Engine, ema: EMA, enabled: bool = True) -> Iterator[None]:
    """The model has the averaged weights inside, and exactly its own again afterwards."""
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        if enabled:
            averages = ema.pieces()
            for name, piece in engine.trained().items():
                for pair in zip(piece.values.split(_SWAP_CHUNK), averages[name].values.split(_SWAP_CHUNK), strict=True):
                    _swap(*pair)
                    swapped.append(pair)
            engine.refresh_weights()
        yield
    finally:
        for pair in swapped:
            _swap(*pair)
        # Also without a swap: sharded weights that a forward pass has gathered are given back.
        engine.refresh_weights()


@torch.no_grad()
def _swap(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


# ---------------------------------------------------------------- words


def in_words(losses: Mapping[str, float]) -> str:
    """Losses by data set; where nearly all is noise, beside what simple predictors would come to."""
    parts = []
    for name in _data_sets(losses):
        words = []
        if (mse := losses.get(f"val/mse/{name}")) is not None:
            words.append(f"{name} {mse:.3g} (from {TIMES[-1]:.0%} noise {losses[f'val/mse/{name}/{NOISIEST}']:.3g}")
            words += [f"{what} {error:.3g}" for what, error in _baselines(losses, name).items()]
            words[-1] += ")"
        if (ce := losses.get(f"val/ce/{name}")) is not None:
            words.append(f"{'' if words else f'{name} '}text {ce:.3g}")
        parts.append(", ".join(words))
    return "; ".join(parts)


def warnings_of(losses: Mapping[str, float]) -> list[str]:
    """Data sets on which the model is no better than a simple predictor where nearly all is noise."""
    return [
        f"on {name} the validation loss from {TIMES[-1]:.0%} noise is {mse:.3g}, not below the {error:.3g} of {what}: "
        "the model has not learned yet what its prompts and references say. If that stays, check the learning rate, "
        "and with `echo4o data preview` that targets follow from them."
        for name in _data_sets(losses)
        if (mse := losses.get(f"val/mse/{name}/{NOISIEST}")) is not None
        for what, error in list(_baselines(losses, name).items())[:1]
        if mse >= error
    ]


def _baselines(losses: Mapping[str, float], name: str) -> dict[str, float]:
    """Errors of simple predictors on a data set from the noisiest time, in words."""
    known = {"copying a reference": f"val/copy_reference/{name}", "the mean picture": f"val/predict_mean/{name}"}
    return {what: losses[f"{key}/{NOISIEST}"] for what, key in known.items() if key in losses}


def _data_sets(losses: Mapping[str, float]) -> list[str]:
    """Data sets that losses are of."""
    kinds = ("val/mse/", "val/ce/")
    names = [name.removeprefix(kind) for name in losses for kind in kinds if name.startswith(kind)]
    return [name for name in dict.fromkeys(names) if not name.rpartition("/")[2].startswith("t_0.")]


def _in_words(error: Exception) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory. Lower --validation_rows, or height and width of the requests"
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _survivable(step: int) -> Iterator[None]:
    """Results that cannot be written are a warning."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PeerFailure):
            raise
        logger.warning("results of the evaluation at step %d cannot be written, training goes on: %s", step, error)


def _forget_frames(error: Any) -> None:
    """They hold the tensors of what failed."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
