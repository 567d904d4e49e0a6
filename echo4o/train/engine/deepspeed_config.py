"""DeepSpeed's settings from our flags and, where there is one, the user's JSON file.

What the file says is used; what it leaves open (absent or ``"auto"``) follows our flags; what cannot work here is
refused with the remedy, and what is ours to do (optimiser, schedule) is named in `ZeroSettings.notes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from echo4o.config import ConfigError

STAGES = (1, 2, 3)
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
#: Elements that are exchanged at once: 400 MB in float32. DeepSpeed's own default would take five times that.
BUCKET_SIZE = 100_000_000

#: Sections that are ours, and what does their work here.
OURS = {
    "optimizer": "--lr, --beta1, --beta2, --eps and --weight_decay",
    "scheduler": "--lr_scheduler and --warmup_steps",
    "activation_checkpointing": "--activation_checkpointing",
    "checkpoint": "our own checkpoints, which load on any number of ranks",
    "tensorboard": "--tensorboard",
    "wandb": "--wandb",
}
#: Parts of DeepSpeed that change what a rank computes or holds in ways this trainer does not know, or that want to see
#: forward passes through DeepSpeed's own engine.
UNSUPPORTED = (
    "pipeline", "tensor_parallel", "sequence_parallel_size", "expert_parallel", "hybrid_engine", "amp", "compile",
    "torch_autocast", "elasticity", "autotuning", "flops_profiler", "curriculum_learning", "data_efficiency",
    "compression_training", "gradient_predivide_factor", "prescale_gradients", "gradient_allreduce_op",
)  # fmt: skip
#: The same within zero_optimization: switches that must stay off, and why.
UNSUPPORTED_ZERO = {
    "cpu_offload": "DeepSpeed's old name: use offload_optimizer",
    "cpu_offload_param": "DeepSpeed's old name: use offload_param",
    "round_robin_gradients": "it moves parameters to places that checkpoints cannot find",
    "zenflow": "it updates parts of the weights late",
    "zero_quantized_nontrainable_weights": "frozen weights would be saved quantised",
}


@dataclass
class ZeroSettings:
    """What `deepspeed.initialize` is given.

    Attributes:
        config: DeepSpeed's dictionary.
        stage: 1 shards the optimiser, 2 also gradients, 3 also parameters.
        offloads_optimizer / offloads_weights: they stay in host memory.
        notes: what a reader of the banner should know.
    """

    config: dict[str, Any]
    stage: int
    offloads_optimizer: bool
    offloads_weights: bool
    notes: list[str] = field(default_factory=list)


def zero_settings(
    config_file: str | Path | None,
    *,
    zero_stage: int,
    cpu_offload: bool,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    world_size: int,
    on_gpu: bool,
) -> ZeroSettings:
    """Our flags, overridden by the file.

    Raises:
        ConfigError: for a file that cannot be read, or settings that cannot work here.
    """
    given = {} if config_file is None else _read(Path(config_file))
    where = "the flags" if config_file is None else str(config_file)
    notes = _take_out_ours(given)
    _refuse_unsupported(given, where)
    _refuse_contradictions(given, where, compute_dtype, gradient_accumulation_steps, max_grad_norm, world_size)

    zero = given.pop("zero_optimization", {})
    stage = zero.pop("stage", zero_stage)
    if stage not in STAGES:
        raise ConfigError(
            f"zero_optimization.stage is {stage!r} in {where}; choose 1 (shards the optimiser), 2 (also gradients) or "
            "3 (also parameters)"
        )
    if stage != zero_stage:
        notes.append(f"ZeRO stage {stage} from {where}, not --zero_stage {zero_stage}")
    if cpu_offload and not on_gpu:
        notes.append("cpu_offload changes nothing on a CPU")
    zero = _merged(_our_zero(stage, cpu_offload, on_gpu), zero)
    offloads = {part: _offloads(zero, part, where) for part in ("offload_optimizer", "offload_param")}
    if offloads["offload_param"] and stage != 3:
        raise ConfigError(f"offload_param in {where} needs ZeRO stage 3: set zero_optimization.stage to 3 or remove it")

    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": {"enabled": compute_dtype == torch.bfloat16},
        "communication_data_type": DTYPE_NAMES[reduce_dtype],
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # Clipping is the engine's: the norm is wanted before the update, and a norm that is not finite skips it.
    config = {**_merged(ours, given), "gradient_clipping": 0.0, "zero_optimization": zero}
    return ZeroSettings(config, stage, offloads["offload_optimizer"], offloads["offload_param"], notes)


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read deepspeed_config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"deepspeed_config {path} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed_config {path} holds a {type(given).__name__}; DeepSpeed's settings are an object")
    if not isinstance(given.get("zero_optimization", {}), dict):
        raise ConfigError(f'zero_optimization in {path} must be an object such as {{"stage": 3}}')
    return _without_auto(given)


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``"auto"`` leaves a setting open, as in transformers' integration."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value != "auto"
    }


def _our_zero(stage: int, cpu_offload: bool, on_gpu: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_SIZE,
        "allgather_bucket_size": BUCKET_SIZE,
    }
    if cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return zero


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `ours`; sections that both have are merged setting by setting."""
    merged = {**ours, **given}
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(ours.get(name), dict):
            merged[name] = {**ours[name], **value}
    return merged


def _take_out_ours(given: dict[str, Any]) -> list[str]:
    """Remove what this trainer does itself; says so."""
    return [
        f"{name} of the DeepSpeed file is not used: see {ours}"
        for name, ours in OURS.items()
        if given.pop(name, None)  # an empty section says nothing
    ]


def _refuse_unsupported(given: Mapping[str, Any], where: str) -> None:
    for name in UNSUPPORTED:
        if _is_on(given.get(name)):
            raise ConfigError(f"{name} in {where} is not supported: remove it")
    if _is_on(given.get("fp16")):
        raise ConfigError(
            f'fp16 in {where} is not supported: use "bf16": {{"enabled": "auto"}}, which needs no scaling'
        )
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if given.get("bf16", {}).get(name):
            raise ConfigError(f"bf16.{name} in {where} is not supported: masters and optimiser are float32. Remove it")
    for name, why in UNSUPPORTED_ZERO.items():
        if _is_on(given.get("zero_optimization", {}).get(name)):
            raise ConfigError(f"zero_optimization.{name} in {where} is not supported ({why}): remove it")


def _is_on(setting: Any) -> bool:
    """A section unless it is empty or disabled; a switch that is set; a number other than 1."""
    if isinstance(setting, dict):
        return bool(setting) and bool(setting.get("enabled", True))
    return setting is True or setting not in (None, False, 0, 1, "", [])


def _refuse_contradictions(
    given: dict[str, Any],
    where: str,
    compute_dtype: torch.dtype,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    world_size: int,
) -> None:
    """What both sides know must agree: the trainer goes by the flags."""
    expected: dict[str, tuple[Any, str]] = {
        "gradient_accumulation_steps": (gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "train_micro_batch_size_per_gpu": (1, "a pack, which --expected_num_tokens fills,"),
        "train_batch_size": (gradient_accumulation_steps * world_size, "packs × ranks a step"),
        "gradient_clipping": (max_grad_norm, "--max_grad_norm"),
        "managed_gradient_accumulation": (True, "how this trainer accumulates"),
    }
    for name, (ours, flag) in expected.items():
        if name in given and given.pop(name) != ours:
            raise ConfigError(f'{name} in {where} contradicts {flag}, which is {ours}: set it to "auto"')
    if "bf16" in given and "enabled" in given["bf16"]:
        wanted = torch.bfloat16 if given["bf16"]["enabled"] else torch.float32
        if wanted != compute_dtype:
            raise ConfigError(
                f"bf16.enabled in {where} contradicts {str(compute_dtype).removeprefix('torch.')}, in which this run "
                f'computes: set it to "auto", or pass --dtype {str(wanted).removeprefix("torch.")}'
            )


def _offloads(zero: Mapping[str, Any], part: str, where: str) -> bool:
    section = zero.get(part)
    if not section or section.get("device", "cpu") == "none":
        return False
    if section.get("device", "cpu") != "cpu":
        raise ConfigError(
            f"zero_optimization.{part}.device in {where} is {section['device']!r}: weights and optimiser must stay in "
            'memory, where checkpoints find them. Use "cpu"'
        )
    for name, off in (("ratio", 1.0), ("super_offload", False)):
        if section.get(name, off) != off:
            raise ConfigError(f"zero_optimization.{part}.{name} in {where} needs DeepSpeed's own optimiser: remove it")
    return True
