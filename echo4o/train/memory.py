"""What a run needs of device and host memory, counted from the model on the meta device before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from echo4o.checkpoint.names import is_adapter
from echo4o.config import ConfigError
from echo4o.model import Bagel, BagelConfig
from echo4o.model.bagel import CE_CHUNK
from echo4o.train.parallelize import blocks

#: What a process takes besides tensors: interpreter, libraries, data loading.
PROCESS_BYTES = 250_000_000
#: Which weights are there in the compute dtype besides the shards: none of them (one process), those of the blocks at
#: work (FULL_SHARD, HYBRID_SHARD, ZeRO-3), or all (SHARD_GRAD_OP, NO_SHARD, ZeRO-1 and -2).
GATHERED = ("none", "blocks", "all")
#: torchao: numbers that share a scale, and the size from which states are quantised.
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process. Activations and the working set are rough counts, everything else is exact.

    Attributes:
        weights: this process' share of float32 masters of what trains and of the frozen rest in its own dtype.
        gradients: float32, of what trains.
        optimizer / ema: of what trains.
        working: weights in the compute dtype that are gathered or cast, and gradients before they are divided.
        activations: kept between forward and backward, for one pack.
        on_host: which of these are in host memory though the model computes on a GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    working: int
    activations: int
    on_host: frozenset[str] = frozenset()

    def parts(self, on_host: bool | None = None) -> dict[str, int]:
        """Part → bytes, in order; of the device or of the host only, if asked."""
        names = ("weights", "gradients", "optimizer", "ema", "working", "activations")
        return {name: getattr(self, name) for name in names if on_host is None or (name in self.on_host) == on_host}

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def device(self) -> int:
        """Bytes on the device that computes."""
        return sum(self.parts(on_host=False).values())


def estimate_memory(
    model: Bagel,
    config: BagelConfig,
    num_tokens: int,
    activation_checkpointing: str,
    compute_bytes: int,
    *,
    shard: int = 1,
    gathered: str = "none",
    cpu_offload: bool = False,
    ema_offload: bool = False,
    optimizer: str = "adamw",
) -> MemoryEstimate:
    """Memory of one training step on one process (the VAE, the data loader and CUDA's own come on top).

    Args:
        model: on any device; what trains is chosen and frozen weights have their dtype already.
        num_tokens: length of the longest pack.
        compute_bytes: bytes a number of the compute dtype.
        shard: processes that share one copy of the model.
        gathered: one of `GATHERED`.
        cpu_offload: weights, gradients, optimiser and average are in host memory.
        optimizer: ``adamw`` or ``adamw_8bit``.
    """
    parameters = list(model.parameters())
    trained = [_share(p, shard) for p in parameters if p.requires_grad]
    weights = sum(_share(p, shard) * (4 if p.requires_grad else p.element_size()) for p in parameters)
    weights += sum(buffer.nbytes for buffer in model.buffers())
    on_host = {"ema"} if ema_offload else set()
    if cpu_offload:
        on_host = {"weights", "gradients", "optimizer", "ema"}
    return MemoryEstimate(
        weights=weights,
        gradients=4 * sum(trained),
        optimizer=sum(_state_bytes(count, optimizer) for count in trained),
        ema=4 * sum(trained),
        working=_working_set(model, compute_bytes, gathered),
        activations=_activation_bytes(model, config, num_tokens, activation_checkpointing, compute_bytes),
        on_host=frozenset(on_host),
    )


def _share(parameter: nn.Parameter, shard: int) -> int:
    """Numbers of a parameter on one process: FSDP2 divides rows and rounds up."""
    shape = tuple(parameter.shape)
    return -(-shape[0] // shard) * math.prod(shape[1:]) if shape else 1


def _state_bytes(count: int, optimizer: str) -> int:
    if optimizer == "adamw_8bit" and count >= _SMALLEST_8BIT and count % _BLOCK_8BIT == 0:
        return 2 * (count + 4 * count // _BLOCK_8BIT)
    return 8 * count


def _working_set(model: Bagel, compute_bytes: int, gathered: str) -> int:
    if gathered == "none":
        # Under autocast each trained weight has a copy in the compute dtype for the length of a forward pass.
        return _numbers(model.parameters(), trained=True) * compute_bytes if compute_bytes < 4 else 0
    units = list(_sharding_units(model))
    inside = {id(p) for unit in units for p in unit.parameters()}
    root = [p for p in model.parameters() if id(p) not in inside]
    largest = max(_numbers(unit.parameters()) for unit in units)
    # A block's gradient is computed whole, then summed over processes in float32.
    gradients = max(_numbers(unit.parameters(), trained=True) for unit in units) * (compute_bytes + 4)
    gradients += _numbers(root, trained=True) * compute_bytes
    if gathered == "all":
        return _numbers(model.parameters()) * compute_bytes + gradients
    # The next block is gathered while one is at work; what belongs to no block stays for the whole step.
    return (_numbers(root) + 2 * largest) * compute_bytes + gradients


def _sharding_units(model: Bagel) -> Iterator[nn.Module]:
    """As `echo4o.train.parallelize.shard` divides the model."""
    yield from blocks(model)
    if not model.config.llm.tie_word_embeddings:
        yield model.language_model.model.embed_tokens
        yield model.language_model.lm_head


def _numbers(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def _activation_bytes(model: Bagel, config: BagelConfig, num_tokens: int, mode: str, compute_bytes: int) -> int:
    """Counted from the tensors that a decoder layer's backward needs, and one piece of the next-token head's logits."""
    llm = config.llm
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    attention = 2 * (2 * q + 2 * kv) + 2 * q
    whole = 6 * llm.hidden_size + attention + 4 * llm.intermediate_size
    if any(is_adapter(name) for name, _ in model.language_model.named_parameters()):
        whole += 5 * llm.hidden_size + q + llm.intermediate_size  # each adapter keeps an input of its own
    kept = {"none": whole, "selective": 2 * llm.hidden_size + q + kv + llm.intermediate_size, "full": llm.hidden_size}[
        mode
    ]
    # Besides the layers' own: one layer being recomputed, and the embeddings.
    numbers = llm.num_hidden_layers * kept + (whole if mode != "none" else 0) + 3 * llm.hidden_size
    logits = min(num_tokens, CE_CHUNK) * llm.vocab_size * (compute_bytes + 8)
    return num_tokens * numbers * compute_bytes + logits


# ---------------------------------------------------------------- host


@dataclass(frozen=True)
class HostEstimate:
    """Bytes of a node's memory.

    Attributes:
        state: weights, gradients, optimiser and average that its processes keep there.
        snapshot: copies of what a background save writes.
        processes: besides tensors.
    """

    state: int
    snapshot: int
    processes: int

    @property
    def total(self) -> int:
        return self.state + self.snapshot + self.processes


def host_estimate(
    memory: MemoryEstimate,
    *,
    ranks_on_node: int = 1,
    on_cpu: bool = False,
    async_save: bool = True,
    writers_on_node: int | None = None,
) -> HostEstimate:
    """What the processes of a node need of its memory. Reading adds nothing: files are mapped, each process copies its
    own share.

    Args:
        on_cpu: the model computes on the CPU, so that all its tensors are there.
        async_save: checkpoints are written in the background, from copies.
        writers_on_node: ranks that write (of several replicas one does); None: all.
    """
    parts = memory.parts() if on_cpu else memory.parts(on_host=True)
    state = sum(size for name, size in parts.items() if name != "activations")
    snapshot = (
        memory.gradients + memory.optimizer + memory.ema if async_save else 0
    )  # masters are as large as gradients
    writers = ranks_on_node if writers_on_node is None else writers_on_node
    return HostEstimate(ranks_on_node * state, writers * snapshot, ranks_on_node * PROCESS_BYTES)


def refuse_if_it_cannot_fit(estimate: HostEstimate, available: int | None) -> None:
    """Stop before loading where host memory clearly does not suffice: the system would kill the run without a word.

    Raises:
        ConfigError: with what would help.
    """
    if available is None or estimate.total <= 1.05 * available:
        return
    remedies = ["freeze parts (--freeze_und True, --train_only gen) or train adapters (--lora_rank 16)"]
    if estimate.snapshot:
        remedies.insert(0, "--async_save False, which needs no copies for saving")
    if estimate.state:
        remedies += ["--cpu_offload False and --ema_offload False", "more nodes, so that each holds less"]
    raise ConfigError(
        f"this node's processes would need {size_text(estimate.total)} of host memory ({size_text(estimate.state)} "
        f"weights and training state + {size_text(estimate.snapshot)} copies while saving + "
        f"{size_text(estimate.processes)} for the processes), but {size_text(available)} are available. What helps: "
        f"{'; '.join(remedies)}."
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes of the device (GPU), or those of the host that are not in use; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return available_host_memory()


def available_host_memory() -> int | None:
    """Bytes that processes may still take (file caches count as free), within a container's limit; None if unknown."""
    known = [size for size in (_free_of_machine(), _free_of_container()) if size is not None]
    return min(known) if known else None


def _free_of_machine() -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with suppress(ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_of_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Of control groups, version 2 or 1."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, StopIteration):
            numbers = [int((root / name).read_text(encoding="utf-8")) for name in (limit, used)]
            statistics = (root / used).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
            return numbers[0] - numbers[1] + next(int(s.split()[1]) for s in statistics if s.split()[0] == cache)
    return None
