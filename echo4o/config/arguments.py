"""The settings of a run. Field names, types and defaults are upstream BAGEL's flags; `OWN_FLAGS` lists ours.

Deviations from upstream: ``max_grad_norm`` is a float everywhere (one fork annotates it as int, which rejects 0.5 on
the command line). Everything else keeps its default, so that upstream's commands mean what they meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Where the model comes from, what it looks like, and how often conditions are dropped."""

    model_path: str = _flag(
        "hf/BAGEL-7B-MoT", "BAGEL folder or owner/name: configs, tokenizer and VAE with finetune_from_hf"
    )
    llm_path: str = _flag("hf/Qwen2.5-0.5B-Instruct/", "language model, when a BAGEL is assembled from parts")
    vae_path: str = _flag("flux/vae/ae.safetensors", "VAE weights, when a BAGEL is assembled from parts")
    vit_path: str = _flag(
        "hf/siglip-so400m-14-980-flash-attn2-navit/", "vision encoder, when a BAGEL is assembled from parts"
    )
    llm_qk_norm: bool = _flag(True, "normalise queries and keys in attention")
    tie_word_embeddings: bool = _flag(False, "share input and output word embeddings")
    layer_module: str = _flag("Qwen2MoTDecoderLayer", "decoder layer: MoT, MoE (experts in the MLP only) or dense")
    max_latent_size: int = _flag(32, "latent position table: tokens a side; 64 for BAGEL-7B-MoT")
    latent_patch_size: int = _flag(2, "latent pixels a side of one token")
    vit_patch_size: int = _flag(14, "image pixels a side of one understanding token")
    vit_max_num_patch_per_side: int = _flag(70, "understanding position table: patches a side")
    connector_act: str = _flag("gelu_pytorch_tanh", "activation between vision encoder and language model")
    interpolate_pos: bool = _flag(False, "interpolate position ids to the table instead of counting rows and columns")
    vit_select_layer: int = _flag(-2, "vision encoder layer whose output is used; later layers are not built")
    vit_rope: bool = _flag(False, "rotary positions in the vision encoder")
    text_cond_dropout_prob: float = _flag(0.1, "chance to drop a text condition")
    vae_cond_dropout_prob: float = _flag(0.3, "chance to drop an image's VAE condition, each image separately")
    vit_cond_dropout_prob: float = _flag(0.3, "chance to drop an image's ViT condition, each image separately")
    all_refs_dropout_prob: float = _flag(
        0.0, "chance to drop all reference images of a sample together (trains guidance without images)"
    )


@dataclass
class DataArguments:
    """Which data is read, and how samples are packed into one sequence."""

    dataset_config_file: str = _flag("data/configs/example.yaml", "YAML of data set groups")
    prefetch_factor: int = _flag(2, "packs each worker prepares ahead")
    num_workers: int = _flag(4, "loader processes a rank; 0 loads in the training process")
    max_num_tokens_per_sample: int = _flag(16384, "skip longer samples")
    max_num_tokens: int = _flag(36864, "hard limit of a pack")
    prefer_buffer_before: int = _flag(16384, "below this length a pack is filled from the buffer first")
    max_buffer_size: int = _flag(50, "samples that may wait for a pack they fit into")
    data_seed: int = _flag(42, "seed of data order and of every random decision about an example")
    dataset_info: str | None = _flag(
        None, "YAML with the paths of every data set; may also stand in the data set YAML itself"
    )
    max_bad_row_share: float = _flag(0.1, "stop when more than this share of rows is unusable")
    data_cache_dir: str | None = _flag(
        None, "folder on a node's own disk into which parquet files are copied on first use"
    )
    latent_cache: str | None = _flag(
        None, "folder of echo4o data cache: images in it are neither decoded nor encoded by the VAE again"
    )
    latent_cache_strict: bool = _flag(False, "stop at an image that latent_cache lacks instead of encoding it")


@dataclass
class TrainingArguments:
    """The run: outputs, resuming, optimiser, losses, freezing, and the machine it runs on."""

    visual_gen: bool = _flag(True, "build and train the image generation branch")
    visual_und: bool = _flag(True, "build and train the image understanding branch")
    results_dir: str = _flag("results", "metrics, resolved config and plots")
    checkpoint_dir: str = _flag("results/checkpoints", "checkpoints, one folder a step")
    wandb_project: str = _flag("bagel", "Weights & Biases project")
    wandb_name: str = _flag("run", "Weights & Biases run name")
    wandb_runid: str = _flag("0", "suffix of the Weights & Biases run id")
    wandb_resume: str = _flag("allow", "allow, must or never")
    wandb_offline: bool = _flag(False, "keep Weights & Biases logs on disk")
    wandb: bool = _flag(False, "log to Weights & Biases (upstream: always)")
    tensorboard: bool = _flag(True, "log to TensorBoard under results_dir")
    global_seed: int = _flag(4396, "seed of weights that are initialised here")
    auto_resume: bool = _flag(False, "go on from the newest checkpoint in checkpoint_dir, if there is one")
    resume_from: str | None = _flag(None, "checkpoint to go on from; with resume_model_only: weights to start from")
    resume_model_only: bool = _flag(False, "take only the weights of resume_from; same as init_from")
    finetune_from_ema: bool = _flag(False, "with resume_model_only: take its EMA weights; same as init_weights ema")
    finetune_from_hf: bool = _flag(False, "configs, tokenizer and VAE come from model_path instead of from parts")
    resume_data: bool = _flag(
        True, "on resume continue the data stream; False begins it anew but keeps weights, optimiser and step"
    )
    init_from: str | None = _flag(
        None, "BAGEL folder, checkpoint or owner/name[@revision] of the hub that a new run starts from"
    )
    init_weights: str = _flag(
        "auto", "which weights of init_from: auto (EMA if there), ema, model, or random (its architecture only)"
    )
    log_every: int = _flag(10, "steps between log lines")
    save_every: int = _flag(2000, "steps between checkpoints")
    keep_last_n: int = _flag(0, "checkpoints to keep, newest first; 0 keeps all")
    keep_every: int = _flag(0, "also keep each checkpoint whose step is a multiple of this; 0: none beyond keep_last_n")
    async_save: bool = _flag(True, "write checkpoints in the background while training goes on")
    log_rows: bool = _flag(False, "write the rows of every step to rows/ in results_dir, a file a rank")
    total_steps: int = _flag(500_000, "stop after this many optimiser steps")
    eval_every: int = _flag(
        0, "steps between evaluations, and one before the first step and after the last; 0: no evaluation"
    )
    eval_weights: str = _flag("ema", "weights that are evaluated: ema or model")
    validation_config_file: str | None = _flag(
        None, "YAML of data set groups for validation losses; dataset_config_file itself: its groups' validation splits"
    )
    validation_rows: int = _flag(32, "rows of each data set that validation losses are measured on")
    eval_requests: str | None = _flag(
        None, "JSONL of requests (as for echo4o generate --requests) that every evaluation draws"
    )
    warmup_steps: int = _flag(2000, "steps of linear warm-up")
    lr_scheduler: str = _flag("constant", "constant or cosine (down to min_lr)")
    lr: float = _flag(1e-4, "learning rate")
    min_lr: float = _flag(1e-7, "where cosine ends")
    beta1: float = _flag(0.9, "AdamW")
    beta2: float = _flag(0.95, "AdamW")
    eps: float = _flag(1e-15, "AdamW")
    weight_decay: float = _flag(0.0, "AdamW, matrices only (upstream: always 0)")
    optimizer: str = _flag("adamw", "adamw, or adamw_8bit (8-bit states, through torchao; GPUs only)")
    lr_groups: str | None = _flag(
        None, "learning rates of their own: pattern=lr, separated by commas; in YAML a mapping. The first match counts"
    )
    ema: float = _flag(0.9999, "decay of the weights' moving average; it needs about 1 / (1 - ema) steps")
    ema_bias_correction: bool = _flag(False, "shorter average at the start, so that a short run has a useful EMA")
    ema_offload: bool = _flag(False, "keep the average in host memory")
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm")
    timestep_shift: float = _flag(1.0, "shift training time steps towards noise; 4 for BAGEL fine-tuning")
    mse_weight: float = _flag(1.0, "weight of the flow-matching loss")
    ce_weight: float = _flag(1.0, "weight of the next-token loss")
    ce_loss_reweighting: bool = _flag(False, "weight each text's tokens by 1 / sqrt(length)")
    expected_num_tokens: int = _flag(32768, "a pack is full at this length")
    gradient_accumulation_steps: int = _flag(1, "packs an optimiser step; losses are normalised over all of them")
    max_nonfinite_steps: int = _flag(10, "stop after this many skipped steps in a row (loss or gradient not finite)")
    keep_packs_per_step: bool = _flag(
        True, "on resume with another number of ranks adapt gradient_accumulation_steps, so that steps stay as large"
    )
    engine: str = _flag("fsdp", "fsdp (one process needs no sharding) or deepspeed")
    zero_stage: int = _flag(3, "DeepSpeed: 1 shards the optimiser, 2 also gradients, 3 also parameters")
    deepspeed_config: str | None = _flag(None, "DeepSpeed JSON; what it leaves open follows these flags")
    num_replicate: int = _flag(1, "replicas of the HYBRID_SHARD mesh")
    num_shard: int = _flag(8, "ranks that share one replica")
    sharding_strategy: str = _flag("HYBRID_SHARD", "how parameters are sharded over ranks")
    backward_prefetch: str = _flag("BACKWARD_PRE", "prefetch of sharded parameters in the backward pass")
    cpu_offload: bool = _flag(False, "keep sharded parameters in host memory")
    reduce_dtype: str = _flag("float32", "dtype in which gradients are summed over ranks: float32 or bfloat16")
    dist_timeout: float = _flag(1800.0, "seconds after which a collective operation that does not end stops the run")
    hang_timeout: float = _flag(1800.0, "seconds without progress after which all stacks are dumped and the run ends")
    dead_rank_timeout: float = _flag(60.0, "seconds without a sign of life after which a rank counts as dead")
    stop_grace: float = _flag(600.0, "seconds that a stop signal's checkpoint may take before the process gives up")
    freeze_llm: bool = _flag(False, "do not train the language model")
    freeze_vit: bool = _flag(False, "do not train the vision encoder")
    freeze_vae: bool = _flag(True, "do not train the VAE")
    freeze_und: bool = _flag(False, "train the generation experts only")
    train_only: str | None = _flag(
        None, "train only parameters whose name matches one of these patterns, separated by commas; in YAML a list"
    )
    frozen_dtype: str = _flag("auto", "dtype of frozen weights: auto (as in the file), float32 or bfloat16")
    lora_rank: int = _flag(0, "rank of LoRA adapters; 0: none. In YAML also as lora: {rank, alpha, dropout, targets}")
    lora_alpha: float = _flag(0.0, "LoRA updates are scaled by lora_alpha / lora_rank; 0: twice the rank")
    lora_dropout: float = _flag(0.0, "dropout in front of LoRA adapters")
    lora_targets: str = _flag(
        "gen", "what LoRA adapts: gen, und, vit, connector, heads, or patterns of module names, separated by commas"
    )
    copy_init_moe: bool = _flag(True, "assembled from parts: start generation experts as copies of understanding's")
    use_flex: bool = _flag(False, "upstream's switch for flex attention; see attention_kernel")
    attention_kernel: str = _flag("auto", "auto (flex on a GPU, sdpa on a CPU), sdpa, flex or flash")
    activation_checkpointing: str = _flag("full", "recompute activations: none, selective or full (upstream: full)")
    compile: bool = _flag(False, "torch.compile every block")
    dtype: str = _flag("auto", "compute type: auto (bfloat16 on a GPU), float32 or bfloat16; what trains stays float32")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")
    peak_device_tflops: float = _flag(0.0, "peak for the MFU figure; 0 looks the device up (on a CPU: measures it)")


#: Title of each group of flags → name of its first flag, in order.
GROUPS: Mapping[str, str] = {
    "Model": "model_path",
    "Condition dropout": "text_cond_dropout_prob",
    "Data and packing": "dataset_config_file",
    "Branches": "visual_gen",
    "Outputs and logging": "results_dir",
    "Start and resume": "global_seed",
    "Frequency": "log_every",
    "Evaluation during training": "eval_every",
    "Optimiser": "warmup_steps",
    "Losses and steps": "timestep_shift",
    "Sharding and processes": "keep_packs_per_step",
    "Freezing and LoRA": "freeze_llm",
    "Machine": "use_flex",
}

#: Flags that are ours; all others are upstream's.
OWN_FLAGS = frozenset(
    (
        "all_refs_dropout_prob",
        "dataset_info",
        "max_bad_row_share",
        "data_cache_dir",
        "latent_cache",
        "latent_cache_strict",
        "wandb",
        "tensorboard",
        "resume_data",
        "init_from",
        "init_weights",
        "keep_last_n",
        "keep_every",
        "async_save",
        "log_rows",
        "eval_every",
        "eval_weights",
        "validation_config_file",
        "validation_rows",
        "eval_requests",
        "weight_decay",
        "optimizer",
        "lr_groups",
        "ema_bias_correction",
        "ema_offload",
        "max_nonfinite_steps",
        "keep_packs_per_step",
        "engine",
        "zero_stage",
        "deepspeed_config",
        "reduce_dtype",
        "dist_timeout",
        "hang_timeout",
        "dead_rank_timeout",
        "stop_grace",
        "train_only",
        "frozen_dtype",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "attention_kernel",
        "activation_checkpointing",
        "compile",
        "dtype",
        "device",
    )
)

#: Flags that describe the architecture: a model folder overrules their defaults, and contradicts a given value.
ARCHITECTURE_FLAGS = (
    "llm_qk_norm",
    "tie_word_embeddings",
    "layer_module",
    "max_latent_size",
    "latent_patch_size",
    "vit_patch_size",
    "vit_max_num_patch_per_side",
    "connector_act",
    "interpolate_pos",
    "vit_select_layer",
    "vit_rope",
)


@dataclass
class RunConfig:
    """All settings of one run.

    Attributes:
        given: settings that were stated rather than defaulted → where (a YAML file or "command line").
        overruled: settings of a YAML file that the command line put out of force by another one → that file.
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)
    given: dict[str, str] = field(default_factory=dict)
    overruled: dict[str, str] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every (flag, value), flat."""
        for part in (self.model, self.data, self.training):
            yield from dataclasses.asdict(part).items()

    def source(self, name: str) -> str:
        """Where a setting's value comes from, for messages."""
        return self.given.get(name, "the default")

    def given_architecture(self) -> dict[str, Any]:
        """Architecture settings that were stated; a model folder that says otherwise is an error."""
        values = dict(self.items())
        return {name: values[name] for name in ARCHITECTURE_FLAGS if name in self.given}


def fields_by_group() -> Iterator[tuple[str, list[tuple[type, dataclasses.Field]]]]:
    """(title, [(dataclass, field)]) of every group, in the order of the dataclasses."""
    starts = {first: title for title, first in GROUPS.items()}
    group: list[tuple[type, dataclasses.Field]] = []
    title = ""
    for part in (ModelArguments, DataArguments, TrainingArguments):
        for setting in dataclasses.fields(part):
            if setting.name in starts:
                if group:
                    yield title, group
                title, group = starts[setting.name], []
            group.append((part, setting))
    yield title, group
