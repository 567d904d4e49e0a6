"""What a run states before its first step: weights, parameters, what trains, tokens and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from echo4o.model import Bagel, BagelConfig


def size_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process; activations are a rough count, everything else is exact.

    Attributes:
        weights: float32 masters of what trains and the frozen rest in its own dtype.
        gradients / optimizer / ema: float32, for what trains.
        activations: kept between forward and backward, for one pack.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate_memory(
    model: Bagel, config: BagelConfig, num_tokens: int, activation_checkpointing: str, compute_bytes: int
) -> MemoryEstimate:
    """Memory of one training step with AdamW on one process (VAE and data loader come on top).

    Args:
        num_tokens: length of the longest pack.
        compute_bytes: bytes a number of the compute dtype.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * (4 if p.requires_grad else p.element_size()) for p in model.parameters())
    activations = num_tokens * _activation_numbers(config, activation_checkpointing) * compute_bytes
    return MemoryEstimate(weights, 4 * trained, 8 * trained, 4 * trained, activations)


def _activation_numbers(config: BagelConfig, mode: str) -> int:
    """Numbers kept a token: counted from the tensors that a decoder layer's backward needs."""
    llm = config.llm
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    attention = 2 * (2 * q + 2 * kv) + 2 * q
    whole = 6 * llm.hidden_size + attention + 4 * llm.intermediate_size
    kept = {"none": whole, "selective": 2 * llm.hidden_size + q + kv + llm.intermediate_size, "full": llm.hidden_size}[
        mode
    ]
    # Besides the layers' own: one layer being recomputed, and the embeddings.
    return llm.num_hidden_layers * kept + (whole if mode != "none" else 0) + 3 * llm.hidden_size


def available_memory(device: torch.device) -> int | None:
    """Bytes of the device (GPU), or of the host that are not in use; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def parameter_lines(model: Bagel) -> list[str]:
    """Parameters by part: how many there are and how many of them train."""
    lines = []
    total = trained = 0
    for part, parameters in model.parts().items():
        count = sum(p.numel() for _, p in parameters)
        active = sum(p.numel() for _, p in parameters if p.requires_grad)
        total, trained = total + count, trained + active
        lines.append(f"  {part:<22} {count:>16,}  {_trains(count, active)}")
    lines.append(f"  {'total':<22} {total:>16,}  {trained:,} train")
    return lines


def _trains(count: int, active: int) -> str:
    if active == count:
        return "trains"
    return "frozen" if not active else f"{active:,} train"


def banner(
    *,
    source: str,
    unexpected: Iterable[str],
    model: Bagel,
    memory: MemoryEstimate,
    available: int | None,
    facts: Mapping[str, str],
) -> str:
    """The start-up text. Missing tensors are not in it: they stop the run before."""
    unexpected = list(unexpected)
    lines = [f"weights from {source}", "  missing tensors        none"]
    if unexpected:
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        lines.append(f"  unused tensors         {', '.join(unexpected[:3])}{more}")
    lines += parameter_lines(model)
    lines += [f"  {name:<22} {text}" for name, text in facts.items()]
    parts = ("weights", "gradients", "optimizer", "ema", "activations")
    detail = " + ".join(f"{size_text(getattr(memory, part))} {part}" for part in parts)
    lines.append(f"  {'memory, estimated':<22} {size_text(memory.total)} = {detail}")
    if available is not None and memory.total > available:
        lines.append(
            f"  WARNING: only {size_text(available)} are available. Lower --expected_num_tokens and --max_num_tokens, "
            "freeze parts (--freeze_vit True, --freeze_und True), or pass --activation_checkpointing full."
        )
    return "\n".join(lines)
