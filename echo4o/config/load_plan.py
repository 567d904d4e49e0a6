"""What a run loads: upstream's seven flags resolved into two verbs, ``init_from`` and ``resume_from``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from echo4o.config.arguments import ModelArguments, RunConfig
from echo4o.config.errors import ConfigError

MODEL_PATH = ModelArguments.model_path
_PARTS = ("llm_path", "vit_path", "vae_path", "copy_init_moe")
INIT_WEIGHTS = ("auto", "ema", "model", "random")


@dataclass(frozen=True)
class LoadPlan:
    """Where weights, configs and training state come from. At most one of the three kinds of start is set.

    Attributes:
        init_from: folder whose weights a new run starts from.
        init_weights: ``ema``, ``model``, or ``None`` for the EMA weights where there are any, else the others.
        resume_from: checkpoint that is continued: weights, EMA, optimiser, step, data stream.
        configs_from: folder with architecture, tokenizer and VAE; ``None`` when the model is assembled from parts.
            With neither `init_from` nor `resume_from`, a model of this architecture starts from random weights.
        from_parts: (llm_path, vit_path, vae_path) of a model that is assembled from parts.
        notes: how the flags were understood, for the start-up banner.
    """

    init_from: str | None = None
    init_weights: str | None = None
    resume_from: str | None = None
    configs_from: str | None = None
    from_parts: tuple[str, str, str] | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """The plan in one sentence, then how the flags led to it, a line each."""
        which = f"{self.init_weights} weights" if self.init_weights else "weights (EMA where there are any)"
        if self.resume_from:
            head = f"resume_from {self.resume_from}: weights, EMA, optimiser, step and data stream"
        elif self.init_from:
            head = f"init_from {self.init_from}: {which}; step 0"
        elif self.from_parts:
            head = "assembled from parts: llm {}, vit {}, vae {}".format(*self.from_parts)
        else:
            head = f"RANDOM weights of the architecture in {self.configs_from}"
        if self.configs_from and self.configs_from not in (self.init_from, self.resume_from):
            head += f"; configs, tokenizer and VAE from {self.configs_from}" if self.init_from else ""
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def plan_loading(
    config: RunConfig, newest: str | Path | None = None, locate: Callable[[str], str] | None = None
) -> LoadPlan:
    """Resolve ``init_from``, ``resume_from`` and upstream's loading flags.

    Args:
        newest: the newest complete checkpoint in ``checkpoint_dir``, if any; used when ``auto_resume`` is set.
        locate: gives the folder of a name that is none (a hub repository's), or the name itself. Asked only for what a
            new start reads.

    Raises:
        ConfigError: if flags contradict each other or a folder does not exist.
    """
    training = config.training
    if training.auto_resume and newest is not None:
        note = "auto_resume: found a checkpoint; the settings that choose a start are not used"
        return LoadPlan(resume_from=str(newest), configs_from=str(newest), notes=(note,))
    notes = ["auto_resume: no checkpoint yet, a new start"] if training.auto_resume else []
    notes += [
        f"{name} of {file} gives way to the command line's {'init_from' if name == 'resume_from' else 'resume_from'}"
        for name, file in config.overruled.items()
    ]
    plan = _own_verbs(config) if training.init_from else _upstream_flags(config)
    if locate is not None:
        plan = _located(plan, locate)
    for path in (plan.init_from, plan.resume_from, plan.configs_from):
        _require_folder(config, path)
    _require_base(config, plan)
    return replace(plan, notes=(*notes, *plan.notes, *_idle_settings(config, plan)))


def _located(plan: LoadPlan, locate: Callable[[str], str]) -> LoadPlan:
    """The plan with folders in place of names, which its notes keep."""
    names = [name for name in dict.fromkeys((plan.init_from, plan.configs_from)) if name and name != plan.resume_from]
    folders = {name: locate(name) for name in names}
    notes = [f"{name} is {folder}" for name, folder in folders.items() if folder != name]
    return replace(
        plan,
        init_from=folders.get(plan.init_from or "", plan.init_from),
        configs_from=folders.get(plan.configs_from or "", plan.configs_from),
        notes=(*plan.notes, *notes),
    )


def _require_base(config: RunConfig, plan: LoadPlan) -> None:
    """LoRA checkpoints name the weights they belong to, so these must lie in a folder."""
    if config.training.lora_rank and not plan.init_from and not plan.resume_from:
        raise ConfigError(
            f"lora_rank is {config.training.lora_rank} ({config.source('lora_rank')}), but the run would start from "
            "weights that lie in no folder. Name a BAGEL folder with --init_from (and init_weights auto, ema or model)."
        )


def _idle_settings(config: RunConfig, plan: LoadPlan) -> list[str]:
    """Stated settings that belong to another kind of start than the plan's."""
    defaults, values = dict(RunConfig().items()), dict(config.items())
    changed = {name for name in config.given if values[name] != defaults[name]}
    notes = []
    if plan.from_parts is None and (idle := [name for name in _PARTS if name in changed]):
        notes.append(f"{', '.join(idle)}: no effect, nothing is assembled from parts")
    if plan.resume_from and (idle := [name for name in ("init_weights",) if name in changed]):
        notes.append(f"{', '.join(idle)}: no effect, resume_from continues with its own weights")
    if not plan.resume_from and not config.training.resume_data and not config.training.auto_resume:
        notes.append("resume_data False: no effect on a new start")
    return notes


def _own_verbs(config: RunConfig) -> LoadPlan:
    training = config.training
    if training.resume_from:
        raise ConfigError(
            f"both init_from ({config.source('init_from')}) and resume_from ({config.source('resume_from')}) are set. "
            "Keep init_from to start a new run from weights, or resume_from to continue one "
            "(auto_resume True does the first, then the second): clear the other with --resume_from none or "
            "--init_from none."
        )
    idle = [name for name in ("resume_model_only", "finetune_from_ema") if getattr(training, name)]
    notes = [f"{name} does nothing beside init_from; init_weights chooses" for name in idle]
    configs_from = training.init_from
    if training.finetune_from_hf and "model_path" in config.given:
        configs_from = config.model.model_path
    elif training.finetune_from_hf:
        notes.append("finetune_from_hf does nothing beside init_from unless model_path is given")
    elif "model_path" in config.given and config.model.model_path not in (MODEL_PATH, training.init_from):
        notes.append("model_path does nothing beside init_from without finetune_from_hf True")
    if training.init_weights == "random":
        return LoadPlan(configs_from=configs_from, notes=tuple(notes))
    weights = None if training.init_weights == "auto" else training.init_weights
    return LoadPlan(init_from=training.init_from, init_weights=weights, configs_from=configs_from, notes=tuple(notes))


def _upstream_flags(config: RunConfig) -> LoadPlan:
    training, model_path = config.training, config.model.model_path
    parts = (config.model.llm_path, config.model.vit_path, config.model.vae_path)
    notes = []
    if training.finetune_from_ema and not training.resume_model_only:
        notes.append("finetune_from_ema does nothing without resume_model_only True")
    if "model_path" in config.given and not training.finetune_from_hf:
        notes.append("model_path does nothing without finetune_from_hf True; init_from is the short way")

    if training.resume_from and not training.resume_model_only:
        return LoadPlan(resume_from=training.resume_from, configs_from=training.resume_from, notes=tuple(notes))
    if training.resume_from:
        weights = "ema" if training.finetune_from_ema else "model"
        notes.append(f"resume_model_only True, finetune_from_ema {training.finetune_from_ema} → init_weights {weights}")
        configs_from = model_path if training.finetune_from_hf else training.resume_from
        if training.finetune_from_hf:
            notes.append("finetune_from_hf True, model_path → configs, tokenizer and VAE")
        if not training.finetune_from_hf and not (Path(training.resume_from) / "llm_config.json").exists():
            # An upstream checkpoint holds weights only.
            return LoadPlan(init_from=training.resume_from, init_weights=weights, from_parts=parts, notes=tuple(notes))
        return LoadPlan(
            init_from=training.resume_from, init_weights=weights, configs_from=configs_from, notes=tuple(notes)
        )
    if training.resume_model_only:
        notes.append("resume_model_only does nothing without resume_from")
    if training.finetune_from_hf:
        # Upstream builds random weights here and trains them without a word (BAGEL issues 86, 110, 80).
        notes.append("finetune_from_hf True without resume_from → init_from model_path (upstream: random weights)")
        weights = None if training.init_weights == "auto" else training.init_weights
        if weights == "random":
            return LoadPlan(configs_from=model_path, notes=tuple(notes[:-1]))
        return LoadPlan(init_from=model_path, init_weights=weights, configs_from=model_path, notes=tuple(notes))
    return LoadPlan(from_parts=parts, notes=tuple(notes))


def _require_folder(config: RunConfig, path: str | None) -> None:
    if path is None or Path(path).is_dir():
        return
    names = [name for name in ("init_from", "resume_from", "model_path") if dict(config.items())[name] == path]
    name = names[0] if names else "checkpoint"
    raise ConfigError(
        f"{name} is {path} ({config.source(name)}), which is not a folder. "
        "Correct the path, download the model there, or name a repository of the hub: owner/name."
    )
