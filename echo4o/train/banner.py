"""What a run states before its first step: weights, parameters, what trains, tokens and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from echo4o.model import Bagel
from echo4o.train.lora import scaled_alpha
from echo4o.train.memory import MemoryEstimate, available_memory, estimate_memory, size_text

__all__ = ["available_memory", "banner", "estimate_memory", "lora_text", "parameter_lines", "size_text"]


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
    lines += memory_lines(memory, available)
    return "\n".join(lines)


def memory_lines(memory: MemoryEstimate, available: int | None) -> list[str]:
    """The estimate by parts, of the device and, where some are there, of the host."""
    lines = [f"  {'memory, estimated':<22} {_sum_text(memory.parts(on_host=False))}"]
    if memory.on_host:
        lines.append(f"  {'in host memory':<22} {_sum_text(memory.parts(on_host=True))}")
    if available is not None and memory.device > available:
        lines.append(
            f"  WARNING: only {size_text(available)} are available. Lower --expected_num_tokens and --max_num_tokens, "
            "pass --activation_checkpointing full, train less (--lora_rank 16, --freeze_und True, --train_only gen), "
            "shard over more GPUs, or keep weights in host memory (--cpu_offload True)."
        )
    return lines


def _sum_text(parts: Mapping[str, int]) -> str:
    detail = " + ".join(f"{size_text(size)} {name}" for name, size in parts.items())
    return f"{size_text(sum(parts.values()))} = {detail}"


def lora_text(rank: int, alpha: float, dropout: float, targets: Sequence[str], layers: Sequence[str]) -> str:
    """Adapters in one line, for the facts of `banner`."""
    dropped = f", dropout {dropout:g}" if dropout else ""
    where = ", ".join(targets)
    return f"rank {rank}, alpha {scaled_alpha(rank, alpha):g}{dropped}, beside {len(layers)} layers ({where})"
