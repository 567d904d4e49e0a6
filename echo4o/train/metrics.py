"""Where a run's numbers go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases on request, and a loss plot."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from echo4o.config import ConfigError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class PictureSink(Protocol):
    """A sink that also shows pictures."""

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None: ...


class MetricsFile:
    """One JSON object a line. Opening it for a resumed run drops the lines after the step it resumes from.

    Args:
        resume_step: steps already taken; 0 starts a new file and sets an old one aside as ``metrics.N.jsonl``.

    Raises:
        OSError: if the folder is not writable.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0) -> None:
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and resume_step == 0:
            _set_aside(self.path)
        elif self.path.exists():
            kept = [json.dumps(record) for record in read_metrics(self.path) if record["step"] <= resume_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(partial, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. JSON knows no NaN: non-finite numbers become null."""
        record = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line cut off by a kill is passed over."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s has a damaged line, passed over: %.60s", path, line)
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class TensorBoardSink:
    """Event files in ``{results_dir}/tensorboard``.

    Raises:
        ImportError: with the command that installs it.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard is not installed: pip install tensorboard, or pass --tensorboard False"
            ) from error
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"samples/{name}", np.asarray(picture), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases run.

    Raises:
        ImportError: with the command that installs it.
        ConfigError: if the run cannot be opened (no login, no network, a run id that must not be resumed).
    """

    def __init__(
        self, folder: str | Path, *, project: str, name: str, run_id: str, resume: str, offline: bool, config: Mapping
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("wandb is not installed: pip install wandb, or pass --wandb False") from error
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=f"{name}-run{run_id}",
                resume=resume,
                mode="offline" if offline else "online",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(init_timeout=120),
            )
        except Exception as error:  # its own classes, requests' and the service's: all mean that it cannot be used
            raise ConfigError(
                f"Weights & Biases cannot be used ({type(error).__name__}: {_first_line(error)}). Log in with "
                "`wandb login`, or pass --wandb_offline True or --wandb False."
            ) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({f"samples/{name}": wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def plot_losses(metrics: str | Path, target: str | Path) -> Path | None:
    """Draw the losses of a ``metrics.jsonl`` over the steps; None if there are none yet."""
    from matplotlib.figure import Figure  # slow to import, needed seldom

    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = 0
    for name, colour in (("loss", "#1f3b73"), ("mse", "#c2571a"), ("ce", "#2f7d4f")):
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        if not points or (
            name == "loss" and len({k for r in records for k in ("mse", "ce") if r.get(k) is not None}) < 2
        ):
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(values), color=colour, linewidth=2, label=name)
        drawn += 1
        held_out = [(r["step"], r[f"val/{name}"]) for r in records if isinstance(r.get(f"val/{name}"), int | float)]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=colour, markersize=4, label=f"{name}, validation")
    if not drawn:
        return None
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, target)
    return target


def _smoothed(values: tuple[float, ...], share: float = 0.1) -> list[float]:
    """Mean of a window around each point, of `share` of the curve: centred, so it does not lag behind."""
    widest = max(1, round(share * len(values) / 2))
    smooth = []
    for i in range(len(values)):
        reach = min(widest, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        smooth.append(sum(window) / len(window))
    return smooth


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _set_aside(path: Path) -> None:
    if not path.stat().st_size:
        return
    number = next(n for n in range(1, 1_000_000) if not path.with_name(f"metrics.{n}.jsonl").exists())
    os.replace(path, path.with_name(f"metrics.{number}.jsonl"))
    logger.warning("%s held an earlier run; it is now metrics.%d.jsonl", path, number)
