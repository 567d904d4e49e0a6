"""From settings to everything a run needs. Cheap checks come first: the weights are read last."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint import train_state
from echo4o.config import ConfigError, LoadPlan, RunConfig, plan_loading, save_resolved, validate
from echo4o.data.loader import PackedLoader
from echo4o.data.sources import SourceGroup
from echo4o.data.tokenizer import SpecialTokens, Tokenizer
from echo4o.model import Bagel, BagelConfig
from echo4o.model.attention import KernelError, resolve_kernel
from echo4o.model.pretrained import iter_tensors
from echo4o.model.vae import WEIGHTS_FILE, AutoEncoder
from echo4o.train.banner import available_memory, banner, estimate_memory
from echo4o.train.data import build_groups, build_loader, build_tokenizer
from echo4o.train.ema import EMA
from echo4o.train.engine import Engine, SingleProcessEngine
from echo4o.train.initialise import InitialModel, architecture_of, initial_model, vae_file
from echo4o.train.metrics import METRICS_FILE, MetricsFile, Sink, TensorBoardSink, WandbSink
from echo4o.train.optim import build_adamw, freeze, lr_schedule, trainable_parameters
from echo4o.train.parallelize import apply_activation_checkpointing, compile_blocks
from echo4o.train.throughput import Throughput, find_peak_tflops

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


@dataclass
class Run:
    """Everything the loop uses.

    Attributes:
        step: optimiser steps taken; the next one is ``step + 1``.
        trainer_state: what the trainer put into the checkpoint that is resumed.
    """

    config: RunConfig
    engine: Engine
    model_config: BagelConfig
    vae: AutoEncoder | None
    vae_path: Path | None
    tokenizer: Tokenizer
    loader: PackedLoader
    ema: EMA
    schedule: Callable[[int], float]
    throughput: Throughput
    sinks: list[Sink] = field(default_factory=list)
    step: int = 0
    trainer_state: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return self.config.training.total_steps

    @property
    def metrics_path(self) -> Path:
        return Path(self.config.training.results_dir) / METRICS_FILE

    def loader_counters(self) -> dict[str, int]:
        """Rows read, skipped by reason, and packed, since the run began."""
        return {f"data/{name}": count for name, count in self.loader.counters().items()}

    def write_assets(self, folder: Path) -> None:
        """Everything besides weights that generation from this checkpoint needs, and the settings."""
        self.model_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]
        if self.vae_path is not None:
            train_state.link_or_copy(self.vae_path, folder / WEIGHTS_FILE)
        save_resolved(self.config, folder / CONFIG_FILE)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.loader.close()


def set_up(config: RunConfig) -> Run:
    """Check the settings, build everything, resume if asked to, and print the banner.

    Raises:
        ConfigError: for anything that cannot work, with the remedy.
    """
    training = config.training
    for note in validate(config):
        logger.warning(note)
    for flag in ("results_dir", "checkpoint_dir"):
        _require_writable(flag, getattr(training, flag))
    plan = plan_loading(config, train_state.latest(training.checkpoint_dir) if training.auto_resume else None)
    engine = _build_engine(config)
    torch.manual_seed(training.global_seed * engine.world_size + engine.rank)

    architecture = architecture_of(plan, config)
    tokenizer, special_tokens = build_tokenizer(plan)
    groups = build_groups(config, architecture, tokenizer, special_tokens)
    loader = build_loader(config, architecture, special_tokens, groups, engine)
    vae, vae_path = _build_vae(plan, config, architecture, engine)
    initial = initial_model(plan, architecture, config)
    model, model_config = initial.model, initial.config
    _fit_vocabulary(model, tokenizer, special_tokens)

    freeze(model, freeze_llm=training.freeze_llm, freeze_vit=training.freeze_vit)
    apply_activation_checkpointing(model, training.activation_checkpointing)
    if training.compile:
        compile_blocks(model)
    _prepare(engine, model, config)
    ema = EMA(trainable_parameters(engine.module), training.ema, training.ema_bias_correction)
    _start_average(ema, plan, initial)

    run = Run(
        config=config,
        engine=engine,
        model_config=model_config,
        vae=vae,
        vae_path=vae_path,
        tokenizer=tokenizer,
        loader=loader,
        ema=ema,
        schedule=_schedule(config),
        throughput=Throughput(
            model_config.llm,
            engine.device,
            config.data.max_num_tokens,
            find_peak_tflops(engine.device, engine.compute_dtype, training.peak_device_tflops),
        ),
    )
    if plan.resume_from:
        _resume(run, plan.resume_from)
    _set_aside_later_checkpoints(run, plan)
    run.sinks = _build_sinks(run)
    if engine.rank == 0:
        print(_banner(run, plan, initial, groups), flush=True)
    return run


# ---------------------------------------------------------------- checks


def _require_writable(flag: str, folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} is {folder}, which cannot be written ({error.strerror}). Choose another folder with --{flag}."
        ) from error


def _build_engine(config: RunConfig) -> Engine:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConfigError(
            f"{world_size} processes were started, but this version trains in one. Start it with --nproc_per_node 1, "
            "or without torchrun."
        )
    try:
        engine = SingleProcessEngine(config.training.device, config.training.dtype)
        resolve_kernel(config.training.attention_kernel, engine.device)
    except (KernelError, ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    return engine


# ---------------------------------------------------------------- model


def _build_vae(
    plan: LoadPlan, config: RunConfig, architecture: BagelConfig, engine: Engine
) -> tuple[AutoEncoder | None, Path | None]:
    if not architecture.visual_gen:
        return None, None
    try:
        path = vae_file(plan.configs_from or config.model.vae_path)
        vae = AutoEncoder.from_pretrained(path, config=architecture.vae, device=engine.device)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return vae.requires_grad_(False), path


def _fit_vocabulary(model: Bagel, tokenizer: Tokenizer, special_tokens: SpecialTokens) -> None:
    """Grow the embeddings for markers that were added to the tokenizer; any other surplus is a mismatch."""
    rows, needed = model.config.llm.vocab_size, len(tokenizer)
    if needed <= rows:
        return
    if needed - rows > special_tokens.num_new_tokens:
        raise ConfigError(
            f"the tokenizer has {needed:,} entries, the word embeddings {rows:,}: they are not from the same model. "
            "Copy the tokenizer files of these weights into their folder."
        )
    model.resize_token_embeddings(needed)
    logger.warning("word embeddings grown from %d to %d rows for the marker tokens", rows, needed)


def _prepare(engine: Engine, model: Bagel, config: RunConfig) -> None:
    training = config.training
    try:
        engine.prepare(
            model,
            lambda module: build_adamw(
                module,
                lr=training.lr,
                beta1=training.beta1,
                beta2=training.beta2,
                eps=training.eps,
                weight_decay=training.weight_decay,
            ),
        )
        model.set_attention_kernel(training.attention_kernel)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model does not fit into the memory of {engine.device}: freeze parts (--freeze_und True, "
            "--freeze_vit True, --visual_und False), or end what else uses the device"
        ) from error
    except (KernelError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _start_average(ema: EMA, plan: LoadPlan, initial: InitialModel) -> None:
    """Upstream: a run that starts from ``model.safetensors`` goes on with the ``ema.safetensors`` beside it."""
    path = initial.weights_file
    if plan.resume_from or path is None or not path.name.startswith("model."):
        return
    beside = path.with_name(path.name.replace("model.", "ema.", 1))
    if beside.exists():
        for name, tensor in iter_tensors(beside):
            ema.load_average({name: tensor})
        logger.info("EMA starts from %s", beside)
        if ema.bias_correction:
            logger.warning("ema_bias_correction: no effect, the average loaded from %s is continued", beside)


def _schedule(config: RunConfig) -> Callable[[int], float]:
    training = config.training
    return lr_schedule(
        training.lr_scheduler,
        lr=training.lr,
        min_lr=training.min_lr,
        warmup_steps=training.warmup_steps,
        total_steps=training.total_steps,
    )


def _resume(run: Run, folder: str) -> None:
    try:
        progress = train_state.load(folder, run.engine, run.ema)
    except train_state.CheckpointError as error:
        raise ConfigError(str(error)) from error
    if run.config.training.resume_data:
        run.loader.load_state_dict(progress.rank["data"])
    else:
        logger.warning("resume_data False: the data begins anew; weights, EMA, optimiser and step are resumed")
    run.step = progress.step
    run.trainer_state = progress.trainer


def _set_aside_later_checkpoints(run: Run, plan: LoadPlan) -> None:
    folder = Path(run.config.training.checkpoint_dir)
    later = {train_state.step_folder(folder, step).resolve() for step in train_state.steps(folder) if step > run.step}
    for used in (plan.init_from, plan.configs_from):
        if used and Path(used).resolve() in later:
            raise ConfigError(
                f"a new run starts from {used}, which lies in its own checkpoint_dir {folder}. Choose another "
                "--checkpoint_dir, or continue that run with --auto_resume True."
            )
    if run.engine.rank == 0 and (moved := train_state.set_aside_later(folder, run.step)):
        logger.warning(
            "%s held checkpoints beyond step %d, where this run starts: they are now in %s "
            "(--auto_resume True would continue that run)",
            folder,
            run.step,
            moved,
        )


# ---------------------------------------------------------------- output


def _build_sinks(run: Run) -> list[Sink]:
    training = run.config.training
    if run.engine.rank:
        return []
    sinks: list[Sink] = []
    try:
        save_resolved(run.config, Path(training.results_dir) / CONFIG_FILE)
        sinks.append(MetricsFile(training.results_dir, run.step))
        if training.tensorboard:
            sinks.append(TensorBoardSink(training.results_dir, run.step))
        if training.wandb:
            sinks.append(
                WandbSink(
                    training.results_dir,
                    project=training.wandb_project,
                    name=training.wandb_name,
                    run_id=training.wandb_runid,
                    resume=training.wandb_resume,
                    offline=training.wandb_offline,
                    config=dict(run.config.items()),
                )
            )
    except ImportError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"results_dir is {training.results_dir}, where nothing can be logged: {error}") from error
    return sinks


def _banner(run: Run, plan: LoadPlan, initial: InitialModel, groups: list[SourceGroup]) -> str:
    training, data, engine = run.config.training, run.config.data, run.engine
    tokens = training.expected_num_tokens * training.gradient_accumulation_steps * engine.world_size
    dtype = str(engine.compute_dtype).removeprefix("torch.")
    memory = estimate_memory(
        initial.model,
        run.model_config,
        data.max_num_tokens,
        training.activation_checkpointing,
        engine.compute_dtype.itemsize,
    )
    facts = {
        "start": plan.describe().replace("\n", "\n" + " " * 25),
        "steps": f"{run.step} → {training.total_steps}",
        "tokens per step": f"{tokens:,} (packs of {training.expected_num_tokens:,} to {data.max_num_tokens:,})",
        "data": "; ".join(
            f"{group.name}: {len(group.source):,} rows, weight {group.weight:g}{', mandatory' * group.is_mandatory}"
            for group in groups
        ),
        "device": f"{engine.device}, {dtype} products, attention {engine.module.attention_kernel}",
        "output": f"{training.results_dir}, checkpoints in {training.checkpoint_dir}",
    }
    return banner(
        source=initial.source,
        unexpected=initial.unexpected,
        model=initial.model,
        memory=memory,
        available=available_memory(engine.device),
        facts=facts,
    )
