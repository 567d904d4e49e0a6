"""``echo4o verify DIR``: everything that is wrong with a folder, in words, with what to do about it.

Any folder: BAGEL's own layout, transformers' (shards, index, remote code), adapters, training checkpoints, downloads.
Memory does not grow with the weights; a forward pass is run where the model fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from echo4o.checkpoint.adapters import CONFIG_FILE, load_bagel
from echo4o.checkpoint.folders import MARKER
from echo4o.checkpoint.hf.check_assets import check_generation, check_remote_code, check_tokenizer
from echo4o.checkpoint.hf.check_files import (
    WeightSet,
    adapter_files,
    check_complete,
    find_sets,
    open_header,
    read_json_files,
)
from echo4o.checkpoint.hf.check_tensors import (
    check_adapters,
    check_dtypes,
    check_manifest,
    check_vae,
    find_base,
    model_of_base,
    read_model,
)
from echo4o.checkpoint.hf.check_values import check_values
from echo4o.checkpoint.hf.findings import (
    Examination,
    Finding,
    counted,
    exit_status,
    report_json,
    report_text,
)
from echo4o.checkpoint.hf.probe import probe_outputs
from echo4o.checkpoint.hf.vae import VAE_INSIDE
from echo4o.model import Bagel
from echo4o.model.config import SCALAR_FILES
from echo4o.model.headers import Header
from echo4o.model.pretrained import upstream_name
from echo4o.model.vae import WEIGHTS_FILE
from echo4o.train.memory import available_host_memory

__all__ = ["Finding", "exit_status", "fits_in_memory", "report_json", "report_text", "verify"]

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def verify(
    folder: str | Path,
    *,
    weights: str | None = None,
    values: bool = True,
    forward: bool | None = None,
    base: str | Path | None = None,
) -> list[Finding]:
    """What is wrong with a folder, errors first; notes say what was checked.

    Args:
        weights: ``ema`` or ``model``; None checks all there are.
        values: read every number (and compare SHA-256 with what an export lists).
        forward: load the model and run a tiny pass; None does where the weights take at most half the free memory.
        base: of a folder with adapters: where its base is now.

    Raises:
        ValueError: for another name of weights.
    """
    folder = Path(folder)
    examination = Examination(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        examination.error(".", f"{what}; a folder is wanted", "pass the folder that holds the weights and configs")
        return examination.conclude()
    provenance = check_complete(examination)
    texts = read_json_files(examination)
    headers: dict[str, Header] = {}
    sets = find_sets(examination, weights, headers)
    is_adapter = (folder / CONFIG_FILE).exists()
    has_configs = any((folder / name).exists() for name in (*SCALAR_FILES, "llm_config.json"))
    model = read_model(examination, texts, sets) if has_configs or not is_adapter else None

    adapters = {
        name: header for name in adapter_files(folder, weights) if (header := open_header(examination, headers, name))
    }
    runs = model  # what a forward pass needs
    if is_adapter:
        runs = _check_adapter_folder(examination, adapters, model, base)
    if model is not None:
        check_manifest(examination, sets, model)
    vae = _check_vae(examination, texts, model, headers)
    _check_assets(examination, texts, model, is_bare=is_adapter)
    read = {name: header for name, header in headers.items() if name not in examination.unusable}
    check_dtypes(examination, read)
    if values:
        check_values(examination, read, model, provenance.files if provenance else {})
    _sum_up(examination, sets, adapters, vae, values)
    _check_forward(examination, forward, runs, read, weights, base)
    return examination.conclude()


def _check_adapter_folder(
    examination: Examination, adapters: Mapping[str, Header], model: Bagel | None, base: str | Path | None
) -> Bagel | None:
    """The model that the adapters belong to, None where there is no base to fill it."""
    config, base_at = find_base(examination, base)
    if base_at is not None and model is None and not examination.has_errors:
        model = model_of_base(examination, base_at)
    if config is not None:
        check_adapters(examination, adapters, config, model)
    if not adapters and not any(name.startswith("adapter_") for name in examination.unusable):
        examination.error(
            ".",
            f"has {CONFIG_FILE} but no adapter_model.safetensors or adapter_ema.safetensors",
            "copy or download the adapters too, or choose other --weights",
        )
    return model if base_at is not None else None


def _check_vae(
    examination: Examination, texts: Mapping[str, dict], model: Bagel | None, headers: dict[str, Header]
) -> Header | None:
    if not (examination.folder / WEIGHTS_FILE).is_file():
        if model is not None and model.config.visual_gen and WEIGHTS_FILE not in examination.unusable:
            what, fix = "without the autoencoder there are no pictures", "copy FLUX's ae.safetensors of the base here"
            if any(upstream_name(name).startswith(VAE_INSIDE) for held in headers.values() for name in held.tensors):
                what, fix = "the autoencoder lies among the weights", "echo4o export writes it into a file of its own"
            examination.error(WEIGHTS_FILE, f"is missing: {what}", fix)
        return None
    header = open_header(examination, headers, WEIGHTS_FILE)
    if header is not None:
        stated = next((texts[name].get("vae_config") for name in SCALAR_FILES if name in texts), None)
        check_vae(examination, header, stated)
    return header


def _check_assets(examination: Examination, texts: Mapping[str, dict], model: Bagel | None, *, is_bare: bool) -> None:
    vocab_size = model.config.llm.vocab_size if model is not None else None
    is_checkpoint = (examination.folder / MARKER).exists()
    has_tokenizer = any((examination.folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
    if has_tokenizer or (model is not None and not is_bare):
        check_tokenizer(examination, vocab_size, for_upstream=not (is_bare or is_checkpoint))
    check_generation(examination, texts.get("generation_config.json"), vocab_size)
    for name in SCALAR_FILES:
        if name in texts:
            check_remote_code(examination, name, texts[name].get("auto_map"))


def _sum_up(
    examination: Examination,
    sets: Sequence[WeightSet],
    adapters: Mapping[str, Header],
    vae: Header | None,
    values: bool,
) -> None:
    """Notes of what was looked at."""
    blamed = {finding.where for finding in examination.findings if finding.level == "error"}
    files = [(found.label, list(found.headers.values())) for found in sets]
    files += [(name, [header]) for name, header in adapters.items()]
    files += [(WEIGHTS_FILE, [vae])] if vae is not None else []
    for label, headers in files:
        if label in blamed or any(header.path.name in blamed for header in headers):
            continue
        dtypes = Counter(stored.dtype for header in headers for stored in header.tensors.values())
        commonest = _TORCH_NAMES.get(dtypes.most_common(1)[0][0], "") if dtypes else ""
        size = sum(header.num_bytes for header in headers) / 1e9
        numbers = ", every number finite" if values else "; values were not read"
        examination.note(label, f"{counted(sum(dtypes.values()), 'tensor')}, {commonest}, {size:.3g} GB{numbers}")


# ---------------------------------------------------------------- forward


def _check_forward(
    examination: Examination,
    forward: bool | None,
    model: Bagel | None,
    headers: Mapping[str, Header],
    weights: str | None,
    base: str | Path | None,
) -> None:
    if forward is False:
        return
    reason = None
    sizes = Counter()
    for header in headers.values():
        for stored in header.tensors.values():
            sizes[stored.dtype] += stored.end - stored.begin
    dtype = "bfloat16" if sizes and sizes.most_common(1)[0][0] == "BF16" else "float32"
    if examination.has_errors or examination.doubts:
        reason = "there are errors"
    elif model is None:
        reason = "the base of the adapters is not here"
    elif forward is None and not fits_in_memory(model, dtype):
        reason = "the model would take more than half of the free memory"
    if reason:
        examination.note(".", f"no forward pass was run: {reason}")
        return
    try:
        outputs = probe_outputs(load_bagel(examination.folder, dtype=dtype, weights=weights, base=base))
    except (OSError, ValueError, RuntimeError) as error:
        examination.error(".", f"the model cannot be loaded and run: {error}", "export or download the folder again")
        return
    bad = [name for name, tensor in outputs.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        examination.error(
            ".",
            f"a forward pass in {dtype} gives numbers that are not finite ({', '.join(bad)})",
            "the weights are broken although each number is finite: take an earlier checkpoint, or download again",
        )
    else:
        examination.note(".", f"a forward pass in {dtype} gives finite numbers")


def fits_in_memory(model: Bagel, dtype: str | torch.dtype) -> bool:
    """Whether a model's weights take at most half of the free memory."""
    size = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    available = available_host_memory()
    needed = sum(parameter.numel() for parameter in model.parameters()) * size
    return available is not None and needed <= available / 2
