"""From settings to everything a run needs. Cheap checks come first: the weights are read last."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echo4o.checkpoint import folders, train_state
from echo4o.checkpoint.adapters import AdapterConfig, write_adapter_config
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.inventory import FROZEN
from echo4o.checkpoint.writer import CheckpointWriter, link_or_copy
from echo4o.config import ConfigError, LoadPlan, RunConfig, plan_loading, save_resolved, validate
from echo4o.config.lists import split_names
from echo4o.data.loader import PackedLoader
from echo4o.data.resume import plan_resume
from echo4o.data.sources import SourceGroup
from echo4o.data.tokenizer import Tokenizer
from echo4o.model import BagelConfig
from echo4o.model.attention import KernelError, resolve_kernel
from echo4o.model.vae import WEIGHTS_FILE, AutoEncoder
from echo4o.train.banner import banner, lora_text
from echo4o.train.caching.using import use_cache
from echo4o.train.data import build_groups, build_loader, build_tokenizer
from echo4o.train.ema import EMA
from echo4o.train.engine import Engine, build_engine
from echo4o.train.engine.single import resolve_device
from echo4o.train.fetching import fetch_base, fetch_model
from echo4o.train.initialise import InitialModel, architecture_of, initial_model
from echo4o.train.liveness import Liveness
from echo4o.train.memory import (
    MemoryEstimate,
    available_memory,
)
from echo4o.train.metrics import METRICS_FILE, MetricsFile, Sink, TensorBoardSink, WandbSink
from echo4o.train.optim import lr_schedule
from echo4o.train.parallelize import apply_activation_checkpointing, compile_blocks
from echo4o.train.placing import (
    adapter_config,
    build_vae,
    choose_what_trains,
    fit_vocabulary,
    memory_of_a_rank,
    place,
    start_average,
)
from echo4o.train.processes import Processes
from echo4o.train.reading import cast_frozen
from echo4o.train.row_log import RowLog
from echo4o.train.stopping import remove_stop_marker
from echo4o.train.throughput import Throughput, find_peak_tflops
from echo4o.train.validation import Validation, build_validation

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


@dataclass
class Run:
    """Everything the loop uses.

    Attributes:
        packs_per_rank: micro-batches of an optimiser step on this rank.
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
    packs_per_rank: int = 1
    sinks: list[Sink] = field(default_factory=list)
    step: int = 0
    trainer_state: dict[str, Any] = field(default_factory=dict)
    frozen_file: Path | None = None
    row_log: RowLog | None = None
    adapters: AdapterConfig | None = None
    validation: Validation | None = None

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
            if not self.vae_path.is_file() and (newest := folders.latest(folder.parent)):
                # It lay in the checkpoint that the run went on from, and keep_last_n has removed that.
                self.vae_path = newest / WEIGHTS_FILE
            link_or_copy(self.vae_path, folder / WEIGHTS_FILE)
        save_resolved(self.config, folder / CONFIG_FILE)
        if self.adapters is not None:
            write_adapter_config(folder, self.adapters)

    def checkpoint_writer(self, on_progress: Callable[[], None]) -> CheckpointWriter:
        training = self.config.training
        return CheckpointWriter(
            training.checkpoint_dir,
            self.engine,
            self.ema,
            self.write_assets,
            keep_last_n=training.keep_last_n,
            keep_every=training.keep_every,
            asynchronous=training.async_save,
            frozen_file=self.frozen_file,
            on_progress=on_progress,
        )

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        if self.row_log is not None:
            self.row_log.close()
        self.loader.close()


def set_up(config: RunConfig, processes: Processes, device: torch.device, liveness: Liveness | None = None) -> Run:
    """Check the settings, build everything, resume if asked to, and print the banner. Called by all ranks alike.

    Raises:
        ConfigError: for anything that cannot work, with the remedy.
    """
    training = config.training
    for note in validate(config, processes.world_size):
        logger.warning(note)
    newest = str(folders.latest(training.checkpoint_dir) or "") if training.auto_resume and not processes.rank else ""
    fetch = partial(fetch_model, processes=processes, on_progress=_on_fetching(liveness))
    plan = plan_loading(config, processes.broadcast(newest) or None, fetch)
    if plan.resume_from:
        fetch_base(plan.resume_from, training.init_from, fetch)
    packs_per_rank, pack_note = _packs_per_rank(plan, config, processes)
    engine = build_engine(config, processes, device, packs_per_rank)
    torch.manual_seed(training.global_seed)  # a model that is initialised here is the same on every rank

    architecture = architecture_of(plan, config)
    tokenizer, special_tokens = build_tokenizer(plan)
    groups = build_groups(config, architecture, tokenizer, special_tokens)
    loader = build_loader(config, architecture, special_tokens, groups, engine, packs_per_rank)
    validation = build_validation(config, architecture, tokenizer, special_tokens, processes)
    vae, vae_path = build_vae(plan, config, architecture, engine)
    initial = initial_model(plan, architecture, config)
    model, model_config = initial.model, initial.config
    fit_vocabulary(model, tokenizer, special_tokens)

    adapted = choose_what_trains(model, config)
    apply_activation_checkpointing(model, training.activation_checkpointing, training.lora_dropout > 0)
    if training.compile:
        compile_blocks(model)
    dtypes = initial.reader.dtypes() if initial.reader is not None else {}
    cast_frozen(model, dtypes, training.frozen_dtype, engine.compute_dtype)
    use_cache(config, groups, (vae, vae_path), (model, initial.reader), engine.compute_dtype, processes)
    memory = memory_of_a_rank(engine, initial, config)
    unexpected = place(engine, initial, config, liveness)
    ema = EMA(engine.trained(), training.ema, training.ema_bias_correction, training.ema_offload)
    start_average(ema, plan, initial)
    torch.manual_seed(training.global_seed * engine.world_size + engine.rank)

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
        packs_per_rank=packs_per_rank,
        adapters=adapter_config(plan, initial, config, adapted),
        validation=validation,
    )
    if plan.resume_from:
        _resume(run, plan.resume_from)
    _set_aside_later_checkpoints(run, plan)
    run.sinks = _build_sinks(run)
    if training.log_rows:
        run.row_log = RowLog(training.results_dir, engine.rank, run.step)
    engine.barrier()
    if engine.rank == 0:
        remove_stop_marker(training.results_dir)
        print(_banner(run, plan, initial, unexpected, groups, memory, pack_note), flush=True)
    return run


def _on_fetching(liveness: Liveness | None) -> Callable[[], None]:
    return lambda: liveness.progress(0, "fetching the model") if liveness else None


def join(config: RunConfig, processes: Processes) -> torch.device:
    """This process' device; joins the process group before anything slow begins.

    Raises:
        ConfigError: if there is no such device, or the attention kernel cannot run on it.
        RendezvousError: if the ranks do not find each other.
    """
    try:
        device = resolve_device(config.training.device, processes.local_rank)
        resolve_kernel(config.training.attention_kernel, device)
    except (KernelError, ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes.start(device)
    return device


def _packs_per_rank(plan: LoadPlan, config: RunConfig, processes: Processes) -> tuple[int, str]:
    """Micro-batches of a step on this rank, and a note where a resumed run needs others than the settings say."""
    training = config.training
    if not plan.resume_from:
        return training.gradient_accumulation_steps, ""
    try:
        train_state.read_training(plan.resume_from)
        if not training.resume_data:
            return training.gradient_accumulation_steps, ""
        saved = train_state.read_rank(plan.resume_from, 0)["data"]
    except (CheckpointError, KeyError) as error:
        raise ConfigError(str(error)) from error
    return plan_resume(saved, processes.world_size, training.gradient_accumulation_steps, training.keep_packs_per_step)


# ---------------------------------------------------------------- checks


def require_writable(flag: str, folder: str) -> None:
    """Raises ConfigError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} is {folder}, which cannot be written ({error.strerror}). Choose another folder with --{flag}."
        ) from error


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
        # The weights were read when the model was placed.
        training = train_state.load(folder, run.engine, run.ema, weights=False)
        if run.config.training.resume_data:
            run.loader.load_state_dict(lambda rank: train_state.read_rank(folder, rank)["data"], training["world_size"])
        else:
            run.loader.begin_at(int(training["step"]))
            logger.warning("resume_data False: the data begins anew; weights, EMA, optimiser and step are resumed")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    run.step = int(training["step"])
    run.trainer_state = training
    run.frozen_file = Path(folder) / FROZEN


def _set_aside_later_checkpoints(run: Run, plan: LoadPlan) -> None:
    folder = Path(run.config.training.checkpoint_dir)
    later = {folders.step_folder(folder, step).resolve() for step in folders.steps(folder) if step > run.step}
    for used in (plan.init_from, plan.configs_from):
        if used and Path(used).resolve() in later:
            raise ConfigError(
                f"a new run starts from {used}, which lies in its own checkpoint_dir {folder}. Choose another "
                "--checkpoint_dir, or continue that run with --auto_resume True."
            )
    if run.engine.rank == 0 and (moved := folders.set_aside_later(folder, run.step)):
        logger.warning(
            "%s held checkpoints beyond step %d, where this run starts: they are now in %s "
            "(--auto_resume True would continue that run)",
            folder,
            run.step,
            moved,
        )
    run.engine.barrier()


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


def _banner(
    run: Run,
    plan: LoadPlan,
    initial: InitialModel,
    unexpected: list[str],
    groups: list[SourceGroup],
    memory: MemoryEstimate,
    pack_note: str,
) -> str:
    training, data, engine = run.config.training, run.config.data, run.engine
    tokens = training.expected_num_tokens * run.packs_per_rank * engine.world_size
    dtype = str(engine.compute_dtype).removeprefix("torch.")
    facts = {
        "start": plan.describe().replace("\n", "\n" + " " * 25),
        "steps": f"{run.step} → {training.total_steps}",
        "tokens per step": f"{tokens:,} (packs of {training.expected_num_tokens:,} to {data.max_num_tokens:,})",
        "data": "; ".join(
            f"{group.name}: {len(group.source):,} rows, {group.describe_share()}{', mandatory' * group.is_mandatory}"
            for group in groups
        ),
        "device": f"{engine.device}, {dtype} products, attention {initial.model.attention_kernel}",
        "processes": f"{engine.world_size} on {engine.processes.num_nodes} machine(s); {engine.describe()}",
        "output": f"{training.results_dir}, checkpoints in {training.checkpoint_dir}",
    }
    if run.adapters is not None:
        lora = run.adapters
        facts["LoRA"] = lora_text(
            lora.rank, lora.alpha, lora.dropout, split_names(training.lora_targets), lora.target_modules
        )
    if run.validation is not None:
        sets = ", ".join(run.validation.data_sets)
        facts["validation"] = f"every {training.eval_every} steps, {run.validation.num_rows} rows of {sets}"
    if pack_note:
        facts["packs"] = pack_note
    if notes := getattr(engine, "notes", []):
        facts["notes"] = "; ".join(notes)
    return banner(
        source=initial.source,
        unexpected=unexpected,
        model=initial.model,
        memory=memory,
        available=available_memory(engine.device),
        facts=facts,
    )
