"""``echo4o export RUN/checkpoints/0002000 --out DIR``: write, verify, describe; complete or nothing."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from echo4o.checkpoint.adapters import read_adapter_config
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.adapter_export import adapter_files, write_adapter_export
from echo4o.checkpoint.hf.card import write_card
from echo4o.checkpoint.hf.export import ExportSettings, plan_export, write_export
from echo4o.checkpoint.hf.findings import Finding
from echo4o.checkpoint.hf.layouts import DEFAULT_SHARD_SIZE
from echo4o.checkpoint.hf.probe import probe_outputs
from echo4o.checkpoint.hf.provenance import Provenance, shown_path
from echo4o.checkpoint.hf.sources import Source, newest_checkpoint
from echo4o.checkpoint.hf.verify import fits_in_memory, verify
from echo4o.checkpoint.hub import local_folder
from echo4o.model import Bagel
from echo4o.model.pretrained import find_weights, iter_tensors

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
RUN_CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SHEETS = "samples/*/sheet.png"
#: Tensors that are compared number by number after writing (all of them are by their hash).
_NUM_SAMPLES = 16


@dataclass(frozen=True)
class ExportRequest:
    """What `echo4o export` is asked for.

    Attributes:
        checkpoint: folder, folder of a run (its newest checkpoint), or ``owner/name`` on the hub.
        out: folder to write.
        layout: ``both``, ``bagel``, ``hf`` or ``adapter``.
        weights: ``ema`` or ``model``; None takes ``ema`` where there is one.
        dtype: None is bfloat16 for a model, unchanged for adapters.
        base: folder or hub name that gives what the checkpoint lacks.
        base_name: what to call the base in what is published.
        max_shard_size: of layout ``hf``.
        max_latent_size: side of a larger position table.
        revision: of a hub name.
        grid: picture for the card; by default what the run drew while training, if it did.
        evaluation: JSON file with scores for the card.
        datasets: hub names of the data sets, for the card.
        forward: compare a forward pass with the checkpoint's; None does where the model fits into memory.
    """

    checkpoint: str | Path
    out: str | Path
    layout: str = "both"
    weights: str | None = None
    dtype: str | None = None
    base: str | Path | None = None
    base_name: str | None = None
    max_shard_size: str = DEFAULT_SHARD_SIZE
    max_latent_size: int | None = None
    revision: str | None = None
    grid: Path | None = None
    evaluation: Path | None = None
    forward: bool | None = None
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        for path in (self.grid, self.evaluation):
            if path is not None and not path.is_file():
                raise CheckpointError(f"{path} is not a file; leave the option out, or correct its path")


def run_export(request: ExportRequest, say: Say = print) -> Provenance:
    """Export and verify; nothing is left behind if anything is wrong.

    Raises:
        CheckpointError: if the checkpoint is no complete model, or what was written is not what it should be.
        FileNotFoundError: if there is no such folder or hub repository.
    """
    folder = newest_checkpoint(local_folder(request.checkpoint, request.revision))
    if folder != Path(request.checkpoint):
        say(f"exporting {folder}")
    base = local_folder(request.base) if request.base else None
    if request.layout == "adapter":
        provenance = _export_adapter(request, folder, base, say)
    else:
        provenance = _export_model(request, folder, base, say)
    _report(request, provenance, say)
    return provenance


def show_plan(request: ExportRequest, say: Say = print) -> None:
    """What `run_export` would write, without writing it.

    Raises:
        CheckpointError, FileNotFoundError: as `run_export`, as far as can be known before.
    """
    folder = newest_checkpoint(local_folder(request.checkpoint, request.revision))
    if request.layout == "adapter":
        files = {name: path.stat().st_size for name, path in adapter_files(folder, request.weights).items()}
        say("\n".join(f"{size:>15,}  {name}" for name, size in files.items()))
        return
    source = _source(request, folder, local_folder(request.base) if request.base else None)
    plan = plan_export(source, _settings(request))
    sizes = plan.file_sizes()
    say("\n".join(f"{size:>15,}  {name}" for name, size in sizes.items()))
    say(f"{sum(sizes.values()):>15,}  bytes, beside configs, tokenizer, card" + (" and code" * _has_code(request)))
    say(f"{len(source.shapes):,} tensors, and {len(plan.vae.names) if plan.vae else 0:,} of the VAE:")
    for origin, count in sorted(source.origins().items()):
        say(f"{count:>15,}  from {origin}")


def _has_code(request: ExportRequest) -> bool:
    return request.layout in ("both", "hf")


def _source(request: ExportRequest, folder: Path, base: Path | None) -> Source:
    return Source(folder, request.weights, base, request.max_latent_size)


def _settings(request: ExportRequest) -> ExportSettings:
    return ExportSettings(request.layout, request.dtype or "bfloat16", request.max_shard_size)


def _export_model(request: ExportRequest, folder: Path, base: Path | None, say: Say) -> Provenance:
    source = _source(request, folder, base)

    def finish(partial: Path, provenance: Provenance) -> None:
        _write_card(request, folder, partial, provenance)
        _require_sound(partial)
        _require_equal_samples(source, partial, request.dtype or "bfloat16")
        _require_equal_forward(source, partial, request, say)

    return write_export(source, request.out, _settings(request), base_name=request.base_name, finish=finish)


def _export_adapter(request: ExportRequest, folder: Path, base: Path | None, say: Say) -> Provenance:
    if request.max_latent_size is not None:
        raise CheckpointError("adapters have no position table; leave out --max-latent-size")
    files = adapter_files(folder, request.weights)
    named = request.base_name or read_adapter_config(folder).base
    if Path(named).is_absolute():
        logger.warning(
            "the adapters name %s as their base, a folder of this machine: pass --base-name owner/name, or others "
            "cannot load them without saying where the base is",
            named,
        )

    def finish(partial: Path, provenance: Provenance) -> None:
        _write_card(request, folder, partial, provenance)
        _require_sound(partial, base)
        say(f"verified: {len(files)} file(s) with adapters")

    return write_adapter_export(
        folder,
        request.out,
        weights=request.weights,
        dtype=request.dtype or "auto",
        base_name=request.base_name,
        finish=finish,
    )


# ---------------------------------------------------------------- verification


def _require_sound(folder: Path, base: Path | None = None) -> None:
    errors = [finding for finding in verify(folder, forward=False, base=base) if finding.level == "error"]
    if errors:
        raise CheckpointError(f"what was written is not sound, and has been removed: {_first(errors)}")


def _first(errors: list[Finding]) -> str:
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{errors[0].where}: {errors[0].what}; {errors[0].fix}{more}"


def _require_equal_samples(source: Source, folder: Path, dtype: str) -> None:
    names = random.Random(0).sample(sorted(source.shapes), min(_NUM_SAMPLES, len(source.shapes)))
    path = find_weights(folder)
    assert path is not None
    for name, written in iter_tensors(path, names):
        wanted = source.tensor(name, source.dtype(name) if dtype == "auto" else getattr(torch, dtype))
        if not torch.equal(written, wanted):
            raise CheckpointError(
                f"{name} was written other than it is in {source.origin(name)}: the disk or the memory is not to be "
                "trusted. Try again on another one."
            )


def _require_equal_forward(source: Source, folder: Path, request: ExportRequest, say: Say) -> None:
    if request.forward is False or (request.forward is None and not fits_in_memory(source.model, torch.float32)):
        why = "not asked for" if request.forward is False else "it would not fit into memory"
        say(f"verified: names, shapes, every number finite, hashes; no forward pass ({why})")
        return
    wanted = _outputs_of(source, request.dtype or "bfloat16")
    found = probe_outputs(Bagel.from_pretrained(folder))
    different = [name for name, output in wanted.items() if not torch.equal(output, found[name])]
    if different:
        worst = max(float((wanted[name] - found[name]).abs().max()) for name in different)
        raise CheckpointError(
            f"the exported model computes something else than the checkpoint ({', '.join(different)} differ by up to "
            f"{worst:.2g}); what was written has been removed. Please report this."
        )
    say("verified: names, shapes, every number finite, hashes; a forward pass equals the checkpoint's")


def _outputs_of(source: Source, dtype: str) -> dict[str, Tensor]:
    """The source's model in memory, its numbers rounded as in the export and computed with in float32."""
    model = Bagel(source.config)
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            target.copy_(source.tensor(name, source.dtype(name) if dtype == "auto" else getattr(torch, dtype)))
    return probe_outputs(model)


# ---------------------------------------------------------------- card and report


def _write_card(request: ExportRequest, folder: Path, partial: Path, provenance: Provenance) -> None:
    path = folder / RUN_CONFIG
    config = path.read_text(encoding="utf-8") if path.is_file() else None
    run = _results_of(folder, config)
    write_card(
        partial,
        provenance,
        run=run,
        config=config,
        grid=request.grid or _drawn_while_training(run, provenance.step),
        evaluation=request.evaluation,
        datasets=tuple(request.datasets),
    )


def _results_of(folder: Path, config: str | None) -> Path | None:
    """The results folder of a checkpoint's run, if its metrics are there."""
    stated = (yaml.safe_load(config) or {}).get("results_dir") if config else None
    candidates = [folder.parent.parent, folder.parent, *([Path(stated)] if isinstance(stated, str) else [])]
    return next((path for path in candidates if (path / METRICS).is_file()), None)


def _drawn_while_training(run: Path | None, step: int | None) -> Path | None:
    """The newest contact sheet that the run drew of this checkpoint's step or before (``eval_requests``)."""
    if run is None:
        return None
    sheets = {int(path.parent.name): path for path in run.glob(SHEETS) if path.parent.name.isdigit()}
    steps = [number for number in sheets if step is None or number <= step]
    return sheets[max(steps)] if steps else None


def _report(request: ExportRequest, provenance: Provenance, say: Say) -> None:
    for origin, count in sorted(provenance.origins.items()):
        say(f"  {count:>6,} tensors from {origin}")
    size = sum(entry["size"] for entry in provenance.files.values())
    step = f", step {provenance.step:,}" if provenance.step is not None else ""
    say(f"{shown_path(request.out)}: {provenance.weights} weights in {provenance.dtype}{step}; {size / 1e9:.3g} GB")
