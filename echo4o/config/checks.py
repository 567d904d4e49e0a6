"""What is wrong with a set of settings, before any long work; every message names the remedy."""

from __future__ import annotations

from pathlib import Path

from echo4o.config.arguments import RunConfig
from echo4o.config.errors import ConfigError
from echo4o.config.lists import invalid_patterns, split_names, split_rates
from echo4o.config.load_plan import INIT_WEIGHTS

CHOICES = {
    "lr_scheduler": ("constant", "cosine"),
    "layer_module": ("Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"),
    "attention_kernel": ("auto", "sdpa", "flex", "flash"),
    "activation_checkpointing": ("none", "selective", "full"),
    "dtype": ("auto", "float32", "bfloat16"),
    "init_weights": INIT_WEIGHTS,
    "wandb_resume": ("allow", "must", "never"),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"),
    "engine": ("fsdp", "deepspeed"),
    "zero_stage": (1, 2, 3),
    "optimizer": ("adamw", "adamw_8bit"),
    "reduce_dtype": ("float32", "bfloat16"),
    "frozen_dtype": ("auto", "float32", "bfloat16"),
    "eval_weights": ("ema", "model"),
    "backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
}
POSITIVE = (
    "max_latent_size",
    "latent_patch_size",
    "vit_patch_size",
    "vit_max_num_patch_per_side",
    "max_num_tokens_per_sample",
    "max_num_tokens",
    "prefetch_factor",
    "log_every",
    "save_every",
    "total_steps",
    "validation_rows",
    "expected_num_tokens",
    "gradient_accumulation_steps",
    "num_replicate",
    "num_shard",
    "max_nonfinite_steps",
    "dist_timeout",
    "hang_timeout",
    "dead_rank_timeout",
    "stop_grace",
    "max_grad_norm",
    "timestep_shift",
    "lr",
    "eps",
)
NOT_NEGATIVE = (
    "num_workers",
    "prefer_buffer_before",
    "max_buffer_size",
    "keep_last_n",
    "keep_every",
    "eval_every",
    "lora_rank",
    "lora_alpha",
    "warmup_steps",
    "min_lr",
    "weight_decay",
    "mse_weight",
    "ce_weight",
    "peak_device_tflops",
    "data_seed",
    "global_seed",
)
UNIT_INTERVAL = (
    "text_cond_dropout_prob",
    "vae_cond_dropout_prob",
    "vit_cond_dropout_prob",
    "all_refs_dropout_prob",
    "lora_dropout",
    "max_bad_row_share",
)
BELOW_ONE = ("beta1", "beta2", "ema")

#: Flags of FSDP2's sharding; of its mesh; and those that do nothing in a run of one process.
_MESH = ("num_replicate", "num_shard")
_SHARDING = (*_MESH, "sharding_strategy", "backward_prefetch")
_ONE_PROCESS = (*_SHARDING, "reduce_dtype", "cpu_offload")
_DEEPSPEED = ("zero_stage", "deepspeed_config")
_LORA = ("lora_alpha", "lora_dropout", "lora_targets")
#: Named sets of `lora_targets` whose gradient freeze_und cuts off.
_CUT_BY_FREEZE_UND = ("und", "vit", "connector")
_EVALUATION = ("eval_weights", "validation_config_file", "validation_rows", "eval_requests")
_WANDB = ("wandb_project", "wandb_name", "wandb_runid", "wandb_resume", "wandb_offline")


def validate(config: RunConfig, world_size: int = 1) -> list[str]:
    """Check settings against each other.

    Args:
        world_size: number of processes that train; settings of sharding have no effect on one.

    Returns:
        Notes for the start-up banner: settings that were stated but do nothing, and values that deserve a second look.

    Raises:
        ConfigError: listing everything that is wrong, each with its remedy.
    """
    values = dict(config.items())

    def found(name: str) -> str:
        return f"{name} is {values[name]} ({config.source(name)})"

    wrong = [
        f"{found(name)}; choose one of {', '.join(map(str, known))}"
        for name, known in CHOICES.items()
        if values[name] not in known
    ]
    wrong += [f"{found(name)}; it must be greater than 0" for name in POSITIVE if not values[name] > 0]
    wrong += [f"{found(name)}; it must not be negative" for name in NOT_NEGATIVE if not values[name] >= 0]
    wrong += [f"{found(name)}; it must lie between 0 and 1" for name in UNIT_INTERVAL if not 0 <= values[name] <= 1]
    wrong += [
        f"{found(name)}; it must be at least 0 and less than 1" for name in BELOW_ONE if not 0 <= values[name] < 1
    ]
    device = values["device"]
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        wrong.append(f"{found('device')}; choose auto, cpu, cuda or cuda:N")
    if values["expected_num_tokens"] > values["max_num_tokens"]:
        wrong.append(
            f"{found('expected_num_tokens')}, more than max_num_tokens {values['max_num_tokens']}: no pack would ever "
            "be full. Lower expected_num_tokens or raise max_num_tokens."
        )
    if values["max_num_tokens_per_sample"] > values["max_num_tokens"]:
        wrong.append(
            f"{found('max_num_tokens_per_sample')}, more than max_num_tokens {values['max_num_tokens']}: such a sample "
            "fits no pack. Lower max_num_tokens_per_sample or raise max_num_tokens."
        )
    if not Path(values["dataset_config_file"]).is_file():
        wrong.append(
            f"{found('dataset_config_file')}, which is not a file. "
            "configs/data/bagel_example.yaml shows how one looks; pass yours as --dataset_config_file."
        )
    if values["latent_cache"] and not Path(values["latent_cache"]).expanduser().is_dir():
        wrong.append(
            f"{found('latent_cache')}, which is not a folder. Make it with echo4o data cache CONFIG --out "
            f"{values['latent_cache']}, or remove the setting."
        )
    if not values["visual_gen"] and not values["visual_und"]:
        wrong.append("visual_gen and visual_und are both False: nothing is left to train. Set one of them to True.")
    if values["freeze_und"] and values["layer_module"] == "Qwen2DecoderLayer":
        wrong.append(
            "freeze_und needs separate experts, but layer_module is Qwen2DecoderLayer. "
            "Use Qwen2MoTDecoderLayer, or freeze_llm."
        )
    if values["min_lr"] > values["lr"] and values["lr_scheduler"] == "cosine":
        wrong.append(f"{found('min_lr')}, more than lr {values['lr']}: cosine would rise. Lower min_lr.")
    wrong += [*_wrong_optimizer(values), *_wrong_training(config, values), *_wrong_evaluation(config, values)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return [
        *_without_effect(config, values),
        *_idle_sharding(config, values, world_size),
        *_idle_freezing(config, values),
        *_idle_evaluation(config, values),
        *_second_looks(values),
    ]


def _wrong_optimizer(values: dict) -> list[str]:
    wrong = []
    try:
        wrong += invalid_patterns("lr_groups", tuple(split_rates(values["lr_groups"])))
    except ConfigError as error:
        wrong.append(str(error))
    if values["optimizer"] == "adamw_8bit":
        if values["engine"] == "deepspeed":
            wrong.append(
                "optimizer is adamw_8bit, but engine is deepspeed, whose ZeRO shards flat float32 states. Use "
                "optimizer adamw, or engine fsdp."
            )
        if values["cpu_offload"]:
            wrong.append(
                "optimizer is adamw_8bit, which runs on GPUs, but cpu_offload updates weights in host memory. Use "
                "optimizer adamw, or cpu_offload False."
            )
        if values["device"] == "cpu":
            wrong.append("optimizer is adamw_8bit, which needs a GPU, but device is cpu. Use optimizer adamw.")
    if values["deepspeed_config"] and not Path(values["deepspeed_config"]).is_file():
        wrong.append(f"deepspeed_config is {values['deepspeed_config']}, which is not a file. Correct the path.")
    return wrong


def _wrong_training(config: RunConfig, values: dict) -> list[str]:
    """Of what trains: patterns, and LoRA where no gradient comes."""
    targets = split_names(values["lora_targets"])
    wrong = invalid_patterns("train_only", split_names(values["train_only"]))
    wrong += invalid_patterns("lora_targets", targets)
    if not values["lora_rank"]:
        return wrong
    if not targets:
        wrong.append("lora_targets names nothing. Use gen, or remove the setting.")
    if values["freeze_und"] and (cut := [target for target in targets if target in _CUT_BY_FREEZE_UND]):
        wrong.append(
            f"lora_targets has {', '.join(cut)} ({config.source('lora_targets')}), but freeze_und True cuts the "
            "gradient there: the adapters would never learn. Set freeze_und False, or adapt gen only."
        )
    return wrong


def _wrong_evaluation(config: RunConfig, values: dict) -> list[str]:
    """Of evaluation during training."""
    remedies = {
        "validation_config_file": "data_examples/dataset_heldout.yaml shows how one looks",
        "eval_requests": 'it holds a JSON object a line, such as {"id": "cube", "prompt": "A red cube"}',
    }
    wrong = [
        f"{name} is {values[name]} ({config.source(name)}), which is not a file; {remedy}."
        for name, remedy in remedies.items()
        if values[name] and not Path(values[name]).expanduser().is_file()
    ]
    if not (values["eval_requests"] and values["eval_every"]):
        return wrong
    if not values["visual_gen"]:
        wrong.append("eval_requests asks for pictures, but visual_gen is False: remove the setting.")
    if values["cpu_offload"] and values["device"] != "cpu":
        wrong.append(
            "eval_requests asks for pictures, but with cpu_offload True every one of a picture's many evaluations of "
            "the network would bring all weights to the GPU. Remove the setting, and draw with echo4o generate from "
            "checkpoints."
        )
    if values["engine"] == "deepspeed" and values["zero_stage"] == 3:
        wrong.append(
            "eval_requests asks for pictures, but DeepSpeed gathers the weights of zero_stage 3 for training's forward "
            "pass only. Use engine fsdp or zero_stage 2, or remove the setting; validation losses work."
        )
    return wrong


def _idle_evaluation(config: RunConfig, values: dict) -> list[str]:
    if not values["eval_every"]:
        idle = [name for name in _EVALUATION if name in config.given]
        return [f"{', '.join(idle)}: no effect with eval_every 0"] if idle else []
    if not values["validation_config_file"] and not values["eval_requests"]:
        return ["eval_every: no effect without validation_config_file or eval_requests, there is nothing to evaluate"]
    if not values["validation_config_file"] and "validation_rows" in config.given:
        return ["validation_rows: no effect without validation_config_file"]
    return []


def _idle_sharding(config: RunConfig, values: dict, world_size: int) -> list[str]:
    """Settings of sharding that another engine, or a single process, does not use."""
    given = set(config.given)
    notes = []
    if values["engine"] == "deepspeed":
        if idle := [name for name in _SHARDING if name in given]:
            notes.append(f"{', '.join(idle)}: no effect with engine deepspeed, where zero_stage says what is sharded")
        return notes
    if idle := [name for name in _DEEPSPEED if name in given]:
        notes.append(f"{', '.join(idle)}: no effect without --engine deepspeed")
    if world_size > 1:
        return notes
    streams = values["cpu_offload"] and values["device"] != "cpu"  # weights are brought to the GPU block by block
    without_effect = _MESH if streams else _ONE_PROCESS
    if idle := [name for name in without_effect if name in given]:
        notes.append(f"{', '.join(idle)}: no effect, one process trains and nothing is sharded")
    return notes


def _idle_freezing(config: RunConfig, values: dict) -> list[str]:
    given = set(config.given)
    notes = []
    if not values["lora_rank"]:
        if idle := [name for name in _LORA if name in given]:
            notes.append(f"{', '.join(idle)}: no effect without --lora_rank")
    elif not values["train_only"] and (idle := [name for name in ("freeze_llm", "freeze_vit") if values[name]]):
        notes.append(f"{', '.join(idle)}: no effect with lora_rank, which freezes everything but the adapters")
    if values["ema_offload"] and (values["device"] == "cpu" or values["cpu_offload"]):
        notes.append("ema_offload: no effect, the average is in host memory as the weights are")
    return notes


def _without_effect(config: RunConfig, values: dict) -> list[str]:
    given = set(config.given)
    notes = []
    if values["keep_every"] and not values["keep_last_n"]:
        notes.append("keep_every: no effect with keep_last_n 0, every checkpoint is kept")
    if "use_flex" in given:
        notes.append(
            "use_flex: no effect, every kernel trains on the same packs; "
            f"attention_kernel ({values['attention_kernel']}) chooses, auto is flex on a GPU and sdpa on a CPU"
        )
    if not values["freeze_vae"]:
        notes.append(
            "freeze_vae False: no effect, images are encoded without gradients (upstream's VAE never trains either)"
        )
    if values["freeze_vit"] and not values["visual_und"]:
        notes.append("freeze_vit: no effect with visual_und False, there is no vision encoder")
    if values["latent_cache"] and not values["visual_gen"]:
        notes.append("latent_cache: no effect with visual_gen False, the run uses no VAE")
    if values["latent_cache_strict"] and not values["latent_cache"]:
        notes.append("latent_cache_strict: no effect without latent_cache")
    if not values["wandb"] and (idle := [name for name in _WANDB if name in given]):
        notes.append(f"{', '.join(idle)}: no effect without --wandb True")
    if not values["num_workers"] and "prefetch_factor" in given:
        notes.append("prefetch_factor: no effect with num_workers 0")
    if values["lr_scheduler"] == "constant" and "min_lr" in given:
        notes.append("min_lr: no effect with lr_scheduler constant")
    return notes


def _second_looks(values: dict) -> list[str]:
    notes = []
    if values["warmup_steps"] >= values["total_steps"]:
        notes.append(
            f"warmup_steps {values['warmup_steps']} is not less than total_steps {values['total_steps']}: the learning "
            "rate never reaches lr. Lower warmup_steps."
        )
    needed = 1 / (1 - values["ema"])
    if not values["ema_bias_correction"] and values["total_steps"] < needed:
        notes.append(
            f"ema {values['ema']} averages over about {needed:,.0f} steps, but the run has {values['total_steps']:,}: "
            "the EMA weights will lag. Set ema_bias_correction True or lower ema."
        )
    if values["save_every"] > values["total_steps"]:
        notes.append("save_every is more than total_steps: only the last step is saved")
    return notes
