"""A complete Hugging Face folder of any checkpoint, or none at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.layouts import (
    DEFAULT_SHARD_SIZE,
    DTYPES,
    INDEX_FILE,
    LAYOUTS,
    PREPROCESSOR_FILE,
    WeightsPlan,
    plan_weights,
    write_configs,
)
from echo4o.checkpoint.hf.new_folder import new_folder
from echo4o.checkpoint.hf.progress import byte_progress
from echo4o.checkpoint.hf.provenance import Provenance, project_commit, project_version, shown_path, write_provenance
from echo4o.checkpoint.hf.sources import Source
from echo4o.checkpoint.hf.tokenizer_files import generation_config, tokenizer_files
from echo4o.checkpoint.hf.vae import VAEFile
from echo4o.checkpoint.hf.writing import Finish, file_digests, write_tensors
from echo4o.checkpoint.weights import write_text
from echo4o.model.vae import WEIGHTS_FILE

logger = logging.getLogger(__name__)

#: Besides weights and VAE.
_SMALL_FILES_BYTES = 1 << 25


@dataclass(frozen=True)
class ExportSettings:
    """What to write.

    Attributes:
        layout: ``both``, ``bagel`` or ``hf`` (`LAYOUTS`; ``adapter`` is `export_adapter`'s).
        dtype: ``bfloat16``, ``float32``, ``float16``, or ``auto`` for each tensor's own.
        max_shard_size: of a file of layout ``hf``.
    """

    layout: str = "both"
    dtype: str = "bfloat16"
    max_shard_size: str = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.layout == "adapter":
            raise CheckpointError(f"layout must be both, bagel or hf, not {self.layout!r}")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known before anything is.

    Attributes:
        weights: files with the model's tensors.
        dtypes: of each tensor.
        vae: the VAE's file; None for a model that draws nothing.
        tokenizer: name → content.
    """

    weights: WeightsPlan
    dtypes: Mapping[str, torch.dtype]
    vae: VAEFile | None
    tokenizer: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        return self.weights.num_bytes + (self.vae.num_bytes if self.vae else 0)

    def file_sizes(self) -> dict[str, int]:
        """Name → bytes, of weights and VAE."""
        sizes = {name: layout.num_bytes for name, layout in self.weights.layouts.items()}
        return sizes | ({WEIGHTS_FILE: self.vae.num_bytes} if self.vae else {})


def plan_export(source: Source, settings: ExportSettings) -> ExportPlan:
    """Everything that can be known and refused without writing.

    Raises:
        CheckpointError: if the VAE or the tokenizer is missing.
    """
    dtypes = {
        name: source.dtype(name) if settings.dtype == "auto" else getattr(torch, settings.dtype)
        for name in source.shapes
    }
    vae = VAEFile.of(source) if source.config.visual_gen else None
    folder = source.tokenizer_folder()
    if folder is None:
        raise CheckpointError(
            f"{source.folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): pass a folder that has "
            "one as --base"
        )
    tensors = {name: (dtypes[name], shape) for name, shape in source.shapes.items()}
    listed = vae.tensor_sizes() if vae else {}
    return ExportPlan(
        plan_weights(tensors, settings.layout, settings.max_shard_size, listed), dtypes, vae, tokenizer_files(folder)
    )


def write_export(
    source: Source,
    out: str | Path,
    settings: ExportSettings | None = None,
    *,
    base_name: str | None = None,
    finish: Finish | None = None,
) -> Provenance:
    """Write `out`: complete, or absent. Memory: one chunk of a tensor (with adapters: one tensor).

    Args:
        base_name: what to call the base, such as ``ByteDance-Seed/BAGEL-7B-MoT``; its folder by default.
        finish: called with the folder under its temporary name; what it raises undoes everything.

    Raises:
        CheckpointError: if something is missing, not finite, does not fit on the disk or cannot be written.
    """
    settings = settings or ExportSettings()
    plan = plan_export(source, settings)
    with new_folder(Path(out), plan.num_bytes + _SMALL_FILES_BYTES) as partial:
        digests = _write_weights(source, plan, partial)
        if plan.weights.index:
            write_text(partial / INDEX_FILE, plan.weights.index)
        if plan.vae:
            digests[WEIGHTS_FILE] = plan.vae.write(partial / WEIGHTS_FILE)
        for name, content in plan.tokenizer.items():
            (partial / name).write_bytes(content)
        _copy_preprocessor(source, partial)
        config = replace(source.config, vae=plan.vae.config(source.config.vae)) if plan.vae else source.config
        write_configs(partial, config, settings.layout, settings.dtype, generation_config(partial))
        provenance = describe(source, settings.layout, settings.dtype, base_name)
        provenance = replace(provenance, files=file_digests(partial, digests))
        write_provenance(partial, provenance)
        if finish:
            finish(partial, provenance)
    return provenance


def _write_weights(source: Source, plan: ExportPlan, folder: Path) -> dict[str, str]:
    """Write the weights files; returns name → SHA-256."""
    digests = {}
    with byte_progress("writing weights", plan.weights.num_bytes) as advance:
        for file, names in plan.weights.files.items():
            pieces = ((name, source.chunks(name, plan.dtypes[name])) for name in names)
            digests[file] = write_tensors(folder / file, plan.weights.layouts[file], pieces, advance)
    return digests


def describe(source: Source, layout: str, dtype: str, base_name: str | None) -> Provenance:
    """Where the tensors come from."""
    base = base_name or (shown_path(source.base) if source.base else None)
    return Provenance(
        source=shown_path(source.folder),
        weights=source.weights,
        layout=layout,
        dtype=dtype,
        step=source.step,
        base=base,
        origins=source.origins(),
        version=project_version(),
        commit=project_commit(),
    )


def _copy_preprocessor(source: Source, folder: Path) -> None:
    for candidate in source.asset_folders():
        if (path := candidate / PREPROCESSOR_FILE).is_file():
            (folder / PREPROCESSOR_FILE).write_bytes(path.read_bytes())
            return
