"""Engines: what runs the model, behind one protocol."""

from __future__ import annotations

import torch

from echo4o.config import ConfigError, RunConfig
from echo4o.train.engine.protocol import Engine
from echo4o.train.engine.single import DTYPES, SingleProcessEngine, resolve_dtype
from echo4o.train.processes import Processes

__all__ = ["Engine", "SingleProcessEngine", "build_engine"]


def build_engine(config: RunConfig, processes: Processes, device: torch.device, packs_per_rank: int) -> Engine:
    """The engine that the settings ask for: one process without sharding, FSDP2, or DeepSpeed.

    Raises:
        ConfigError: if it cannot run here.
    """
    training = config.training
    reduce_dtype = DTYPES[training.reduce_dtype]
    try:
        dtype = resolve_dtype(training.dtype, device)
        if training.engine == "deepspeed":
            from echo4o.train.engine.deepspeed import DeepSpeedEngine  # seconds to import, and an extra

            return DeepSpeedEngine(
                processes,
                device,
                dtype,
                zero_stage=training.zero_stage,
                cpu_offload=training.cpu_offload,
                reduce_dtype=reduce_dtype,
                config_file=training.deepspeed_config,
                gradient_accumulation_steps=packs_per_rank,
                max_grad_norm=training.max_grad_norm,
            )
        if processes.world_size == 1 and not (training.cpu_offload and device.type == "cuda"):
            return SingleProcessEngine(device, dtype, processes)
        from echo4o.train.engine.fsdp import FSDPEngine

        return FSDPEngine(
            processes,
            device,
            dtype,
            strategy=training.sharding_strategy,
            num_replicate=training.num_replicate if "num_replicate" in config.given else None,
            num_shard=training.num_shard if "num_shard" in config.given else None,
            reduce_dtype=reduce_dtype,
            backward_prefetch=training.backward_prefetch,
            cpu_offload=training.cpu_offload,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
