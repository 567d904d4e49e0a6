"""How fast a run is: tokens per second, share of the device's peak, waiting for data, fill of the packs, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch

from echo4o.model.config import LLMConfig
from echo4o.packed import PackedBatch

# Dense BF16 TFLOP/s by a substring of the device's name, first match wins (upstream's table).
PEAK_TFLOPS = (
    (("MI300X",), 1336.0),
    (("H100", "H800", "H200"), 989.0),
    (("A100", "A800"), 312.0),
    (("L40",), 181.05),
    (("L20",), 119.5),
    (("H20",), 148.0),
    (("910B",), 354.0),
    (("RTX 3070 Ti",), 21.75),
)


def peak_tflops(device_name: str) -> float:
    """Peak of a GPU, 0.0 if it is not in the table."""
    return next((peak for names, peak in PEAK_TFLOPS if any(name in device_name for name in names)), 0.0)


def dense_parameters(llm: LLMConfig) -> int:
    """Parameters that every token passes: one expert set of each layer, embedding and head (upstream's count)."""
    q = o = llm.num_attention_heads * llm.head_dim
    k = v = llm.num_key_value_heads * llm.head_dim
    layer = 3 * llm.hidden_size * llm.intermediate_size + llm.hidden_size * (q + k + v + o)
    return llm.num_hidden_layers * layer + 2 * llm.vocab_size * llm.hidden_size


def training_flops(llm: LLMConfig, sample_lens: Sequence[int]) -> float:
    """FLOPs of forward and backward over samples of these lengths: ``6·P·tokens + 12·head_dim·heads·layers·Σ len²``.

    Upstream's formula (ViT and VAE left out, masks ignored), so that numbers compare; no padding is counted here.
    """
    attention = 12 * llm.head_dim * llm.num_attention_heads * llm.num_hidden_layers
    return 6.0 * dense_parameters(llm) * sum(sample_lens) + attention * sum(n * n for n in sample_lens)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory ever allocated: on a GPU by torch, else resident by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def find_peak_tflops(device: torch.device, dtype: torch.dtype, stated: float = 0.0) -> float:
    """`stated` if positive; else a GPU's table entry (0.0: unknown), or what this CPU reaches."""
    if stated > 0:
        return stated
    if device.type == "cuda":
        return peak_tflops(torch.cuda.get_device_name(device))
    return measure_peak_tflops(dtype)


def measure_peak_tflops(dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 5) -> float:
    """TFLOP/s of the fastest of a few square matrix products on the CPU: the yardstick where no table has one."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


class Throughput:
    """Sums since the last `reset`.

    Args:
        peak: TFLOP/s of the device; 0 leaves the MFU out.
    """

    def __init__(self, llm: LLMConfig, device: torch.device, max_num_tokens: int, peak: float = 0.0) -> None:
        self._llm, self._device, self._max_num_tokens = llm, device, max_num_tokens
        self.peak = peak
        self.reset()

    def reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = self._flops = 0.0
        self._num_tokens = self._num_packs = self._num_samples = self._num_steps = 0

    @property
    def seconds(self) -> float:
        """Since the last `reset`, pauses left out."""
        return max(time.perf_counter() - self._start - self._paused, 1e-9)

    def add_step(self, batches: Sequence[PackedBatch]) -> None:
        self._num_steps += 1
        for batch in batches:
            self._num_packs += 1
            self._num_tokens += batch.sequence_length
            self._num_samples += len(batch.sample_names) or len(batch.sample_lens)
            self._flops += training_flops(self._llm, batch.sample_lens)

    @contextmanager
    def waiting(self):
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        """Time spent inside (saving) counts as no time at all."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def summary(self, world_size: int = 1) -> dict[str, float]:
        """Rates of this rank; `world_size` scales the token rates to all ranks."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = self.seconds
        steps = max(1, self._num_steps)
        tflops = self._flops / seconds / 1e12
        values = {
            "seconds_per_step": seconds / steps,
            "tokens_per_sec": self._num_tokens * world_size / seconds,
            "tokens_per_step": self._num_tokens * world_size / steps,
            "samples_per_sec": self._num_samples * world_size / seconds,
            "actual_tflops": tflops,
            "data_wait_share": self._waited / seconds,
            "fill_ratio": self._num_tokens / max(1, self._num_packs * self._max_num_tokens),
            "peak_memory_gb": peak_memory_bytes(self._device) / 1e9,
        }
        if self.peak > 0:
            values["mfu"] = tflops / self.peak
        return values
