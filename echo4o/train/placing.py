"""Putting the model of a run into place: what trains, what it will take, its share on this process, its average."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from echo4o.checkpoint.adapters import AdapterConfig, weights_fingerprint
from echo4o.checkpoint.hub import published_name
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.config import ConfigError, LoadPlan, RunConfig
from echo4o.config.lists import split_names, split_rates
from echo4o.data.tokenizer import SpecialTokens, Tokenizer
from echo4o.model import Bagel, BagelConfig
from echo4o.model.attention import KernelError
from echo4o.model.pretrained import find_weights
from echo4o.model.vae import AutoEncoder
from echo4o.train.ema import EMA
from echo4o.train.engine import Engine
from echo4o.train.initialise import InitialModel, vae_file
from echo4o.train.liveness import Liveness
from echo4o.train.lora import add_lora, init_adapters, scaled_alpha
from echo4o.train.memory import (
    MemoryEstimate,
    available_host_memory,
    estimate_memory,
    host_estimate,
    refuse_if_it_cannot_fit,
    size_text,
)
from echo4o.train.optim import build_optimizer
from echo4o.train.reading import check_weights, reading
from echo4o.train.selection import choose_trainable

logger = logging.getLogger(__name__)


def build_vae(
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


def fit_vocabulary(model: Bagel, tokenizer: Tokenizer, special_tokens: SpecialTokens) -> None:
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


def choose_what_trains(model: Bagel, config: RunConfig) -> list[str]:
    """Adapters and frozen parts; returns the names of the adapted layers."""
    training, adapted = config.training, []
    if training.lora_rank:
        adapted = add_lora(
            model,
            rank=training.lora_rank,
            alpha=training.lora_alpha,
            dropout=training.lora_dropout,
            targets=split_names(training.lora_targets),
        )
    choose_trainable(
        model,
        freeze_llm=training.freeze_llm,
        freeze_vit=training.freeze_vit,
        train_only=split_names(training.train_only),
    )
    return adapted


def adapter_config(
    plan: LoadPlan, initial: InitialModel, config: RunConfig, adapted: list[str]
) -> AdapterConfig | None:
    if not adapted:
        return None
    training = config.training
    if initial.base_file is None:
        raise ConfigError("LoRA adapts weights that lie in files: start from a model folder with --init_from")
    return AdapterConfig(
        base=published_name(initial.base_file.parent),
        rank=training.lora_rank,
        alpha=scaled_alpha(training.lora_rank, training.lora_alpha),
        dropout=training.lora_dropout,
        target_modules=tuple(adapted),
        base_weights=initial.base_file.name.partition(".")[0],
        base_fingerprint=weights_fingerprint(initial.base_file),
    )


def memory_of_a_rank(engine: Engine, initial: InitialModel, config: RunConfig) -> MemoryEstimate:
    """What a rank will take; refused where the host clearly lacks memory, before anything is read."""
    training = config.training
    shard, gathered = engine.sharding()
    memory = estimate_memory(
        initial.model,
        initial.config,
        config.data.max_num_tokens,
        training.activation_checkpointing,
        engine.compute_dtype.itemsize,
        shard=shard,
        gathered=gathered,
        cpu_offload=training.cpu_offload and engine.device.type == "cuda",
        ema_offload=training.ema_offload and engine.device.type == "cuda",
        optimizer=training.optimizer,
    )
    needed = host_estimate(
        memory,
        ranks_on_node=engine.processes.local_world_size,
        on_cpu=engine.device.type == "cpu",
        async_save=training.async_save,
        writers_on_node=min(shard, engine.processes.local_world_size),
    )
    available = available_host_memory()
    if engine.rank == 0:
        known = f", {size_text(available)} are available" if available is not None else ""
        print(
            f"a process needs about {size_text(memory.device)} on {engine.device}, this machine's processes "
            f"{size_text(needed.total)} of host memory{known}",
            flush=True,
        )
    refuse_if_it_cannot_fit(needed, available)
    return memory


def place(engine: Engine, initial: InitialModel, config: RunConfig, liveness: Liveness | None) -> list[str]:
    """Shard the model, read its weights, build the optimiser; returns the file's unused tensors."""
    training, model = config.training, initial.model

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(
            module,
            training.optimizer,
            lr=training.lr,
            beta1=training.beta1,
            beta2=training.beta2,
            eps=training.eps,
            weight_decay=training.weight_decay,
            lr_groups=split_rates(training.lr_groups),
        )

    unexpected, read = [], None
    if initial.reader is not None:
        unexpected = check_weights(model, initial.reader, initial.source)
        read = reading(
            model,
            initial.reader,
            initial.source,
            fill_adapters=lambda pieces: init_adapters(pieces, training.global_seed),
            show=engine.rank == 0,
            on_progress=(lambda: liveness.progress(0, "reading weights")) if liveness else None,
        )
    try:
        engine.prepare(model, optimizer, read)
        model.set_attention_kernel(training.attention_kernel)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model does not fit into the memory of {engine.device}: freeze parts (--freeze_und True, "
            "--freeze_vit True, --visual_und False), or end what else uses the device"
        ) from error
    except (KernelError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return unexpected


def start_average(ema: EMA, plan: LoadPlan, initial: InitialModel) -> None:
    """Upstream: a run that starts from ``model.safetensors`` goes on with the ``ema.safetensors`` beside it."""
    path = initial.weights_file
    if plan.resume_from or path is None or not path.name.startswith("model."):
        return
    beside = find_weights(path.parent, "ema")
    if beside is None:
        return
    pieces = ema.pieces()
    try:
        reader = LayeredReader([WeightsReader(beside)], initial.reader.aliases if initial.reader else {})
        found = {name: place for name in pieces if (place := reader.find(name)) is not None}
        for name, (file, known) in found.items():
            file.fill(known, pieces[name])
    except (OSError, ValueError) as error:
        raise ConfigError(f"the average beside {path} cannot be read: {error}") from error
    if not found:  # adapters, say: their average starts where they do
        return
    if len(found) < len(pieces):
        logger.warning("%s lacks %d of the %d averages", beside, len(pieces) - len(found), len(pieces))
    ema.continue_average()
    logger.info("EMA starts from %s", beside)
    if ema.bias_correction:
        logger.warning("ema_bias_correction: no effect, the average loaded from %s is continued", beside)
