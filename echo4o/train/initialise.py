"""The model a run starts from: a BAGEL folder, one of our checkpoints, or parts (language model, ViT, VAE).

Where its weights lie in files, the model stays on the meta device; the engine has each process read its own share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from echo4o.checkpoint.adapters import AdapterConfig, is_adapter_folder, is_same_base, read_adapter_config
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.checkpoint.train_state import weights_of
from echo4o.checkpoint.weights import load_llm_part, load_vit_part
from echo4o.config import ConfigError, LoadPlan, RunConfig
from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from echo4o.model.config import SCALAR_FILES
from echo4o.model.pretrained import find_weights, read_shapes
from echo4o.model.vae import WEIGHTS_FILE, infer_config
from echo4o.train.fetching import folder_here
from echo4o.train.lora import scaled_alpha

#: What a config file with unexpected content makes of reading it.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)

#: Flags that are named differently in the model's config.
_CONFIG_NAMES = {"llm_qk_norm": "qk_norm"}


@dataclass
class InitialModel:
    """A model, where its weights are, and what the banner says about them.

    Attributes:
        source: the weights' origin in words.
        reader: of its weights, where they lie in files: the model is on the meta device then.
        weights_file: the file that a new run starts from, None for other starts.
        base_file: the file that adapters belong to.
    """

    model: Bagel
    source: str
    reader: LayeredReader | None = None
    weights_file: Path | None = None
    base_file: Path | None = None

    @property
    def config(self) -> BagelConfig:
        return self.model.config


def architecture_of(plan: LoadPlan, config: RunConfig) -> BagelConfig:
    """What will be built, read before any weights so that data and settings can be checked against it.

    Raises:
        ConfigError: if it cannot be read, or settings contradict it.
    """
    if plan.configs_from:
        return folder_config(plan.configs_from, config)
    try:
        return parts_config(config)
    except UNREADABLE as error:
        raise ConfigError(f"cannot assemble a model from parts: {_reason(error)}") from error


def initial_model(plan: LoadPlan, architecture: BagelConfig, config: RunConfig) -> InitialModel:
    """Build the model and find its weights; reading them is the engine's.

    Raises:
        ConfigError: if weights are missing.
    """
    if plan.resume_from:
        return _from_checkpoint(plan, architecture, config)
    if plan.init_from:
        path = _weights_file(plan.init_from, plan.init_weights)
        return InitialModel(_on_meta(architecture), str(path), _reader([path], architecture), path, path)
    if plan.from_parts:
        return _from_parts(architecture, config)
    return InitialModel(Bagel(architecture), f"RANDOM numbers (seed {config.training.global_seed})")


def _from_checkpoint(plan: LoadPlan, architecture: BagelConfig, config: RunConfig) -> InitialModel:
    """Weights of a training checkpoint, over those of its base where it holds adapters only."""
    folder = Path(plan.resume_from or "")
    try:
        readers = weights_of(folder)
        base = read_adapter_config(folder) if is_adapter_folder(folder) else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be resumed: {_reason(error)}") from error
    source, path = str(folder), None
    if base is not None:
        _require_same_adapters(base, folder, config)
        path = _base_file(base, folder, config)
        readers.append(WeightsReader(path))
        source = f"{folder} (adapters) over {path}"
    if not readers:
        raise ConfigError(f"{folder} holds no weights; take another checkpoint")
    aliases = _aliases(architecture)
    return InitialModel(_on_meta(architecture), source, LayeredReader(readers, aliases), base_file=path)


def _require_same_adapters(saved: AdapterConfig, folder: Path, config: RunConfig) -> None:
    training = config.training
    stated = (training.lora_rank, scaled_alpha(training.lora_rank, training.lora_alpha))
    if training.lora_rank and stated != (saved.rank, saved.alpha):
        raise ConfigError(
            f"{folder} has adapters of rank {saved.rank} and alpha {saved.alpha:g}, the settings say rank {stated[0]} "
            f"and alpha {stated[1]:g}. Continue with --lora_rank {saved.rank} --lora_alpha {saved.alpha:g}; other "
            "adapters are another run."
        )


def _base_file(base: AdapterConfig, folder: Path, config: RunConfig) -> Path:
    """The base that a LoRA checkpoint names, or, if it has moved, the one that the settings start from."""
    stated = config.training.init_from
    for candidate in (folder_here(base.base), folder_here(stated or "")):
        if candidate and Path(candidate).is_dir() and (path := find_weights(candidate, base.base_weights)) is not None:
            if is_same_base(path, base):
                return path
            raise ConfigError(
                f"{path} is not the file that the adapters in {folder} were trained on: it has changed, or is another "
                "model. Restore it, or say where the right one is: --init_from FOLDER beside --auto_resume True."
            )
    raise ConfigError(
        f"{folder} holds LoRA adapters of {base.base}, which is not there any more. Say where it is now: --init_from "
        "FOLDER beside --auto_resume True."
    )


def _weights_file(folder: str | Path, weights: str | None) -> Path:
    if is_adapter_folder(folder):
        raise ConfigError(
            f"{folder} holds LoRA adapters only: merge them into their base first (echo4o merge {folder} --out DIR), "
            "or continue that run with --resume_from."
        )
    path = find_weights(folder, weights)
    if path is None:
        wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
        raise ConfigError(
            f"{folder} has no {wanted} (nor a sharded index of it). Download it, or choose other weights with "
            "--init_weights."
        )
    return path


def _reader(paths: list[Path], architecture: BagelConfig) -> LayeredReader:
    try:
        return LayeredReader([WeightsReader(path) for path in paths], _aliases(architecture))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _aliases(architecture: BagelConfig) -> dict[str, str]:
    """Tied embeddings may be stored under either name."""
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    return {head: embedding, embedding: head} if architecture.llm.tie_word_embeddings else {}


def _on_meta(architecture: BagelConfig) -> Bagel:
    with torch.device("meta"):
        return Bagel(architecture)


def folder_config(folder: str | Path, config: RunConfig) -> BagelConfig:
    """The folder's architecture with this run's training settings; its limits are the checkpoint's.

    Raises:
        ConfigError: if the folder cannot be read or a stated flag contradicts it.
    """
    training = config.training
    try:
        found = BagelConfig.from_pretrained(folder, freeze_und=False, timestep_shift=training.timestep_shift)
    except UNREADABLE as error:
        raise _unusable_folder(folder, error) from error
    _refuse_contradictions(folder, found, config)
    try:
        return BagelConfig.from_pretrained(
            folder,
            freeze_und=training.freeze_und,
            timestep_shift=training.timestep_shift,
            visual_gen=found.visual_gen and training.visual_gen,
            visual_und=found.visual_und and training.visual_und,
        )
    except UNREADABLE as error:
        raise _unusable_folder(folder, error) from error


def _unusable_folder(folder: str | Path, error: Exception) -> ConfigError:
    if isinstance(error, OSError):
        return ConfigError(f"{folder} is not a usable model folder: {error}")
    files = [name for name in ("llm_config.json", "vit_config.json", *SCALAR_FILES) if (Path(folder) / name).exists()]
    return ConfigError(
        f"{folder} is not a usable model folder: {_reason(error)}. It was read from {', '.join(files)}; "
        "download them again, or correct them."
    )


def _reason(error: Exception) -> str:
    """Where a file has a list for a mapping or lacks a key, Python's message alone says too little."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) if isinstance(error, ValueError) else f"wrong content ({error})"


def _refuse_contradictions(folder: str | Path, found: BagelConfig, config: RunConfig) -> None:
    tables = {"max_latent_size": "position table", "vit_max_num_patch_per_side": "ViT position table"}
    for flag, stated in config.given_architecture().items():
        actual = _architecture_value(found, flag)
        if actual is None or actual == stated:
            continue
        what = f"holds {actual} × {actual} entries" if flag in tables else f"has {actual}"
        subject = f"the {tables[flag]} of {folder}" if flag in tables else f"{folder}"
        raise ConfigError(
            f"{flag} is {stated} in {config.source(flag)}, but {subject} {what}.\n"
            f"  Remove {flag} to use the checkpoint's value."
        )


def _architecture_value(found: BagelConfig, flag: str) -> object:
    name = _CONFIG_NAMES.get(flag, flag)
    if flag == "vit_patch_size":
        return found.vit.patch_size if found.vit else None
    return getattr(found.llm if name in LLMConfig.__annotations__ else found, name)


def _from_parts(architecture: BagelConfig, config: RunConfig) -> InitialModel:
    """A new BAGEL from a Qwen2 and a SigLIP folder (upstream's pre-training)."""
    paths, training = config.model, config.training
    try:
        model = Bagel(architecture)
        fresh = load_llm_part(model, paths.llm_path)
        if architecture.visual_und:
            load_vit_part(model, paths.vit_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot assemble a model from parts: {error}") from error
    copied = model.init_moe() if training.copy_init_moe else []
    random = [name for name in fresh if "moe_gen" not in name or not training.copy_init_moe]
    notes = [f"language model {paths.llm_path}"] + [f"ViT {paths.vit_path}"] * architecture.visual_und
    notes += [f"{len(copied)} generation tensors copied from understanding"] if copied else []
    notes += [f"{len(random)} of its tensors initialised here, e.g. {random[0]}"] if random else []
    return InitialModel(model, f"parts: {'; '.join(notes)}; connector and latent heads initialised here")


def parts_config(config: RunConfig) -> BagelConfig:
    """Architecture of a BAGEL assembled from parts: the parts' own configs, and the flags for everything else.

    Raises:
        FileNotFoundError: if a part is not there.
        ValueError: if a part is of the wrong kind.
    """
    flags, training = config.model, config.training
    llm = _read_config(flags.llm_path, "llm_path")
    vit = _read_config(flags.vit_path, "vit_path") if training.visual_und else None
    vae = None
    if training.visual_gen:
        path = vae_file(flags.vae_path)
        vae = infer_config(read_shapes(path), str(path))
    return BagelConfig(
        llm=_llm_config(llm, config),
        vit=_known(vit.get("vision_config", vit), ViTConfig) if vit else None,
        vae=vae or VAEConfig(),
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        latent_patch_size=flags.latent_patch_size,
        max_latent_size=flags.max_latent_size,
        vit_max_num_patch_per_side=flags.vit_max_num_patch_per_side,
        connector_act=flags.connector_act,
        interpolate_pos=flags.interpolate_pos,
        timestep_shift=training.timestep_shift,
        vit_select_layer=flags.vit_select_layer,
        vit_rope=flags.vit_rope,
    )


def vae_file(path: str | Path) -> Path:
    """The VAE's weights file: `path` itself or ``ae.safetensors`` in it.

    Raises:
        FileNotFoundError: naming the flag.
    """
    path = Path(path)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"vae_path: {path} does not exist; FLUX's {WEIGHTS_FILE} is expected there")
    return path


def _llm_config(values: Mapping, config: RunConfig) -> LLMConfig:
    theta = (values.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    stated = {
        "rope_theta": theta,
        "num_key_value_heads": values["num_attention_heads"],
        **{key: value for key, value in values.items() if value is not None},
        "layer_module": config.model.layer_module,
        "qk_norm": config.model.llm_qk_norm,
        "tie_word_embeddings": config.model.tie_word_embeddings,
        "freeze_und": config.training.freeze_und,
    }
    return _known(stated, LLMConfig)


def _known(values: Mapping, kind: type):
    return kind(**{key: value for key, value in values.items() if key in kind.__annotations__})


def _read_config(folder: str | Path, flag: str) -> dict:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{flag} is {folder}, but there is no {path}. Give a local Hugging Face folder, or start from a BAGEL "
            "folder with --init_from."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
