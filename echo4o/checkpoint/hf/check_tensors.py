"""Do the tensors that a folder holds fit its configs: names, shapes, dtypes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint.adapters import CONFIG_FILE, AdapterConfig, base_folder, read_adapter_config
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.check_files import WeightSet
from echo4o.checkpoint.hf.findings import Examination, counted, some
from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter
from echo4o.model import Bagel, BagelConfig
from echo4o.model.config import LAYER_MODULES, SCALAR_FILES, LLMConfig, VAEConfig, ViTConfig
from echo4o.model.headers import Header, Stored
from echo4o.model.pretrained import VAE_PREFIXES, upstream_name
from echo4o.model.vae import WEIGHTS_FILE, AutoEncoder, infer_config

#: Config entry → the table whose size it states.
TABLES = {"max_latent_size": "latent_pos_embed.pos_embed", "vit_max_num_patch_per_side": "vit_pos_embed.pos_embed"}
FLOATS = ("F32", "BF16", "F16")
_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}
_NESTED = {"llm_config": LLMConfig, "vit_config": ViTConfig}
#: What makes a config that cannot be used fail, here or while its model is built.
_CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)


# ---------------------------------------------------------------- configs


def read_model(
    examination: Examination, texts: Mapping[str, dict[str, Any]], sets: Sequence[WeightSet]
) -> Bagel | None:
    """The model that the configs describe, on the meta device; None (and an error) if they describe none."""
    scalars_file = next((name for name in SCALAR_FILES if name in texts), None)
    values = dict(texts[scalars_file]) if scalars_file else {}
    if not _check_types(examination, scalars_file or SCALAR_FILES[0], values):
        return None
    _check_nested(examination, scalars_file, values, texts)
    values |= {key: texts[f"{key}.json"] for key in _NESTED if f"{key}.json" in texts}
    if values.get("llm_config") is None:
        if not examination.unusable & {*SCALAR_FILES, "llm_config.json"}:
            examination.error(
                ".",
                "has no config: neither llm_config.json nor a config.json with an llm_config entry",
                "copy llm_config.json, vit_config.json and config.json of the model it was trained from into it",
            )
        return None
    if "vit_config.json" in examination.unusable:
        return None
    sides = _check_tables(examination, scalars_file, values, sets)
    try:
        config = BagelConfig.from_values(values, freeze_und=False, **sides, **_decoder(examination, values, sets))
        with torch.device("meta"):
            return Bagel(config)
    except _CONFIG_ERRORS as error:
        where = _blamed(str(error), texts)
        examination.error(where, f"describes no model: {error}", "copy the configs that were written with the weights")
        return None


def _blamed(message: str, texts: Mapping[str, Any]) -> str:
    words = {"vit_config.json": ("ViTConfig", "vit_config"), "llm_config.json": ("LLMConfig", "llm_config", "layer")}
    for name, hints in words.items():
        if name in texts and any(hint in message for hint in hints):
            return name
    return next((name for name in SCALAR_FILES if name in texts), "llm_config.json")


def _check_types(examination: Examination, where: str, values: Mapping[str, Any]) -> bool:
    for key, kind in BagelConfig.__annotations__.items():
        expected = _TYPES.get(kind)
        if key not in values or expected is None:
            continue
        value = values[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            examination.error(where, f"{key} must be {kind}, not {value!r}", "correct it")
            return False
    return True


def _check_nested(
    examination: Examination, where: str | None, values: Mapping[str, Any], texts: Mapping[str, dict[str, Any]]
) -> None:
    """Where a part's config is stated twice, both must say the same."""
    for key, kind in _NESTED.items():
        nested, own = values.get(key), texts.get(f"{key}.json")
        if not where or not isinstance(nested, Mapping) or own is None:
            continue
        differ = [k for k in kind.__annotations__ if k in nested and k in own and nested[k] != own[k]]
        if differ:
            name = differ[0]
            examination.warning(
                where,
                f"says {key}.{name} is {nested[name]!r}, {key}.json says {own[name]!r}: transformers reads the one, "
                "upstream's scripts the other",
                "make them the same",
            )


def _check_tables(
    examination: Examination, where: str | None, values: Mapping[str, Any], sets: Sequence[WeightSet]
) -> dict[str, int]:
    """Sizes of the stored position tables, which overrule what the config states."""
    sides = {}
    for key, name in TABLES.items():
        found = next(((s.label, t[name]) for s in sets if name in (t := s.tensors())), None)
        if found is None or not found[1].shape:
            continue
        rows, side = found[1].shape[0], math.isqrt(found[1].shape[0])
        if side * side != rows:
            continue  # a wrong shape, whatever the config states
        sides[key] = side
        if where and values.get(key, side) != side:
            examination.error(
                where,
                f"{key} is {values[key]}, but {name} in {found[0]} holds {side} × {side} entries",
                f"write {side} (this project goes by the table; upstream's scripts and transformers by the config)",
            )
    return sides


def _decoder(examination: Examination, values: Mapping[str, Any], sets: Sequence[WeightSet]) -> dict[str, Any]:
    """The kind of decoder that the tensors are of, judged by all of them, so that one that lacks misleads nobody."""
    names = {name for found in sets if not found.partial for name in (*found.tensors(), *found.hidden)}
    if not any(name.startswith("language_model.model.layers.") for name in names):
        return {}
    if any(".self_attn.q_proj_moe_gen." in name for name in names):
        kind = LAYER_MODULES[0]
    else:
        kind = LAYER_MODULES[1 if any(".mlp_moe_gen." in name for name in names) else 2]
    llm = values["llm_config"]
    stated = values.get("layer_module", llm.get("layer_module") if isinstance(llm, Mapping) else None)
    if stated in LAYER_MODULES and stated != kind:
        examination.error(
            "llm_config.json", f"layer_module is {stated}, but the tensors are those of a {kind}", f"write {kind}"
        )
    elif stated is None and kind != LAYER_MODULES[0]:
        examination.warning(
            "llm_config.json",
            f"does not say that the layers are {kind}: upstream assumes MoT",
            f"add layer_module {kind}",
        )
    elif stated is not None and stated not in LAYER_MODULES:
        return {}
    return {"layer_module": kind, "qk_norm": any(".self_attn.q_norm." in name for name in names)}


# ---------------------------------------------------------------- names and shapes


def check_manifest(examination: Examination, sets: Sequence[WeightSet], model: Bagel) -> None:
    """Compare every set of weights with the model: one error a set, for all that does not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    tables, tied = set(model.table_names()), model.config.llm.tie_word_embeddings
    for found in sets:
        held = found.tensors()
        known = held.keys() | found.hidden
        missing = [] if found.partial else [name for name in expected if name not in known and name not in tables]
        if tied and {_HEAD, _EMBEDDING} & known:
            missing = [name for name in missing if name not in (_HEAD, _EMBEDDING)]
        extra = [name for name in held if name not in expected and not name.startswith(VAE_PREFIXES)]
        _report(examination, found.label, expected, held, missing, extra)
        for index in (found, *found.twins):
            _check_index(examination, index, {*missing, *extra})
        absent = [name for name in expected if name in tables and name not in known]
        if absent and not found.partial:
            examination.note(found.label, f"leaves out {some(absent)}: fixed tables, which are computed")
        foreign = [n for h in found.headers.values() for n in h.tensors if upstream_name(n) != n]
        if foreign:
            examination.warning(
                found.label,
                f"names its tensors in another program's way, e.g. {foreign[0]}: read here, not by upstream's scripts",
                "echo4o export writes a folder with upstream's names",
            )


def _check_index(examination: Examination, found: WeightSet, said: set[str]) -> None:
    """An index names the tensors that its files hold; `said` are those that something was said of already."""
    held = {file: header.tensors for file, header in found.headers.items()}
    wrong = [(name, f"{file} holds") for name, file in found.misplaced.items()]
    wrong += [
        (name, "no file holds")
        for name, file in found.mapped.items()
        if name not in held.get(file, {name}) and name not in found.misplaced and file != WEIGHTS_FILE
    ]
    wrong = [(name, where) for name, where in wrong if upstream_name(name) not in said]
    if wrong:
        name, where = wrong[0]
        examination.error(
            found.label,
            f"says otherwise than its files where {counted(len(wrong), 'tensor')} lie, e.g. {name}, which {where}",
            "download the index and its files again: they belong to different saves",
        )


def _report(
    examination: Examination,
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    held: Mapping[str, Stored],
    missing: Sequence[str],
    extra: Sequence[str],
    fix: str = "",
) -> None:
    wrong = [name for name, shape in expected.items() if name in held and held[name].shape != shape]
    faults = []
    if missing:
        faults.append(f"lacks {len(missing):,} of {counted(len(expected), 'tensor')}: {some(missing)}")
        fix = fix or "fill a partial checkpoint from its base (echo4o export --base FOLDER), or download it again"
    if extra:
        faults.append(f"holds {counted(len(extra), 'tensor')} that the configs have no place for: {some(extra)}")
        fix = fix or "remove them, or correct visual_gen, visual_und, layer_module or num_hidden_layers in the configs"
    if wrong:
        shapes = [f"{name} as {held[name].shape} instead of {expected[name]}" for name in wrong]
        faults.append(f"holds {counted(len(wrong), 'tensor')} of another shape: {some(shapes, 2)}")
        fix = fix or "use the configs that were written with these weights"
    if faults:
        examination.error(where, "; ".join(faults), fix)


def check_dtypes(examination: Examination, headers: Mapping[str, Header]) -> None:
    """Weights are float32, bfloat16 or float16."""
    for file, header in headers.items():
        dtypes = {name: stored.dtype for name, stored in header.tensors.items()}
        wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in FLOATS]
        if wrong:
            examination.error(
                file,
                f"holds {counted(len(wrong), 'tensor')} that are not float32, bfloat16 or float16: {some(wrong)}",
                "export again from the weights that they were made from, with --dtype bfloat16 or float32",
            )
        counts = Counter(dtype for dtype in dtypes.values() if dtype in FLOATS).most_common()
        if len(counts) > 1:
            examination.note(file, "mixes " + ", ".join(f"{dtype} ({count:,} tensors)" for dtype, count in counts))


def check_vae(examination: Examination, header: Header, stated: Any) -> None:
    """Compare the autoencoder's file with its config, or with what its own shapes say where there is none."""
    held = {name: stored.shape for name, stored in header.tensors.items()}
    try:
        known = {key: value for key, value in (stated or {}).items() if key in VAEConfig.__annotations__}
        config = VAEConfig(**known) if known else infer_config(held, "it")
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in AutoEncoder(config).state_dict().items()}
    except _CONFIG_ERRORS as error:
        examination.error(WEIGHTS_FILE, f"is no usable autoencoder: {error}", "take FLUX's ae.safetensors")
        return
    fix = "take the ae.safetensors that the model was trained with, or correct vae_config in config.json"
    missing = [name for name in expected if name not in held]
    extra = [name for name in held if name not in expected]
    _report(examination, WEIGHTS_FILE, expected, header.tensors, missing, extra, fix)


# ---------------------------------------------------------------- adapters


def find_base(examination: Examination, base: str | Path | None) -> tuple[AdapterConfig | None, Path | None]:
    """What an adapter folder says, and where its base is; None (and a finding) for what cannot be had."""
    try:
        config = read_adapter_config(examination.folder)
    except CheckpointError as error:
        examination.unusable_file(CONFIG_FILE, f"cannot be used: {error}", "copy it again, or merge with peft")
        return None, None
    try:
        return config, base_folder(examination.folder, config, base)
    except CheckpointError as error:
        if base:
            examination.error(CONFIG_FILE, str(error), "pass the folder of the base as --base")
        else:
            examination.note(
                CONFIG_FILE,
                f"names the base {config.base or '(none)'}, which is not here: layers were not compared with it",
                "say where it is with --base FOLDER",
            )
        return config, None


def model_of_base(examination: Examination, base: Path) -> Bagel | None:
    """The base's model on the meta device."""
    try:
        with torch.device("meta"):
            return Bagel(BagelConfig.from_pretrained(base, freeze_und=False))
    except (OSError, *_CONFIG_ERRORS) as error:
        examination.error(CONFIG_FILE, f"names the base {base}, which is no model: {error}", "echo4o verify the base")
        return None


def check_adapters(
    examination: Examination, headers: Mapping[str, Header], config: AdapterConfig, model: Bagel | None
) -> None:
    """Adapter files: pairs of matrices of the rank that their config states, for layers that the model has."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()} if model else {}
    for file, header in headers.items():
        held = {name.removeprefix(ADAPTER_PREFIX): stored.shape for name, stored in header.tensors.items()}
        fault = _adapter_fault(held, config.rank, expected)
        if fault:
            examination.error(file, fault, "copy the adapter's file and config again: they belong together")


def _adapter_fault(
    held: Mapping[str, tuple[int, ...]], rank: int, expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    for name, shape in held.items():
        twin = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if not is_adapter(name) or len(shape) != 2 or twin not in held:
            return f"is no adapter of linear layers: it holds {name} {shape} without its twin"
        own = shape[0] if ".lora_A." in name else shape[1]
        if own != rank:
            return f"holds {name} of rank {own}, {CONFIG_FILE} says r = {rank}"
        layer = name.partition(".lora_")[0] + ".weight"
        width = shape[1] if ".lora_A." in name else shape[0]
        if expected and layer not in expected:
            return f"adapts {layer.removesuffix('.weight')}, which the model does not have"
        if expected and expected[layer][1 if ".lora_A." in name else 0] != width:
            return f"holds {name} as {shape}, the layer's weight is {expected[layer]}"
    return None if held else "is empty"
