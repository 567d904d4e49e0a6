"""LoRA adapters alone, as a folder in peft's format that names its base."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from echo4o.checkpoint.adapters import is_adapter_folder, read_adapter, read_adapter_config, write_adapter_config
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.layouts import DTYPES
from echo4o.checkpoint.hf.new_folder import new_folder
from echo4o.checkpoint.hf.progress import byte_progress
from echo4o.checkpoint.hf.provenance import Provenance, project_commit, project_version, shown_path, write_provenance
from echo4o.checkpoint.hf.sources import step_of
from echo4o.checkpoint.hf.writing import Finish, file_digests, write_tensors
from echo4o.checkpoint.inventory import ADAPTER, TRAINED
from echo4o.checkpoint.names import ADAPTER_PREFIX
from echo4o.checkpoint.shared_file import plan_file
from echo4o.checkpoint.slices import WeightsReader
from echo4o.model.pretrained import WEIGHTS


def adapter_files(folder: str | Path, weights: str | None = None) -> dict[str, Path]:
    """Name in an exported folder → file of a checkpoint.

    Args:
        weights: ``ema`` or ``model``; None takes ``ema`` where there is one.

    Raises:
        CheckpointError: if there are no such adapters.
    """
    folder = Path(folder)
    kind = adapter_kind(folder, weights)
    trained = {TRAINED["model"]: folder / TRAINED[kind]} if (folder / TRAINED[kind]).is_file() else {}
    return {ADAPTER["model"]: folder / ADAPTER[kind], **trained}


def adapter_kind(folder: Path, weights: str | None) -> str:
    """Which adapters are taken.

    Raises:
        CheckpointError: if there are none.
    """
    if not is_adapter_folder(folder):
        raise CheckpointError(f"{folder} holds no LoRA adapters; leave out --layout adapter to export its weights")
    read_adapter(folder, weights)  # complains of what is damaged
    return weights or next(kind for kind in WEIGHTS if (folder / ADAPTER[kind]).is_file())


def write_adapter_export(
    folder: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    dtype: str = "auto",
    base_name: str | None = None,
    finish: Finish | None = None,
) -> Provenance:
    """Write `out`: complete, or absent.

    Args:
        dtype: ``auto`` keeps the file's, float32.
        base_name: what the adapters' config names as their base, such as ``ByteDance-Seed/BAGEL-7B-MoT``; by default
            what it names now, which may be a folder of this machine.
        finish: as in `write_export`.

    Raises:
        CheckpointError: if there are no adapters, or `out` cannot be written.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    files = adapter_files(folder, weights)
    kind = adapter_kind(folder, weights)
    config = read_adapter_config(folder)
    config = replace(config, base=base_name or config.base)
    readers = {name: _reader(name, path) for name, path in files.items()}
    with new_folder(Path(out), sum(reader.num_bytes for reader in readers.values())) as partial:
        digests = {name: _convert(reader, partial / name, dtype) for name, reader in readers.items()}
        write_adapter_config(partial, config)
        provenance = Provenance(
            source=shown_path(folder),
            weights=kind,
            layout="adapter",
            dtype=dtype if dtype != "auto" else "float32",
            step=step_of(folder),
            base=base_name or shown_path(config.base),
            origins={f"{folder.name}/{path.name}": len(readers[name].shapes) for name, path in files.items()},
            files=file_digests(partial, digests),
            version=project_version(),
            commit=project_commit(),
        )
        write_provenance(partial, provenance)
        if finish:
            finish(partial, provenance)
    return provenance


def _reader(name: str, path: Path) -> WeightsReader:
    try:
        return WeightsReader(path, ADAPTER_PREFIX if name == ADAPTER["model"] else "")
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def _convert(reader: WeightsReader, path: Path, dtype: str) -> str:
    """Write the tensors of a reader in another dtype; returns the file's SHA-256."""
    prefix = ADAPTER_PREFIX if path.name == ADAPTER["model"] else ""
    dtypes = {n: d if dtype == "auto" else getattr(torch, dtype) for n, d in reader.dtypes.items()}
    layout = plan_file({prefix + n: (dtypes[n], shape) for n, shape in reader.shapes.items()})
    tensors = (
        (prefix + n, iter([reader.run(n, 0, math.prod(shape)).to(dtypes[n])])) for n, shape in reader.shapes.items()
    )
    with byte_progress("writing adapters", layout.num_bytes) as advance:
        return write_tensors(path, layout, tensors, advance)
