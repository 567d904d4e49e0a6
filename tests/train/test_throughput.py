"""The MFU formula, the peak table, and the counters."""

from __future__ import annotations

import pytest
import torch

from echo4o.model import LLMConfig
from echo4o.train.throughput import (
    Throughput,
    dense_parameters,
    find_peak_tflops,
    peak_tflops,
    training_flops,
)
from tests.train.test_losses import make_batch
from tests.train.tiny_run import tiny_config

SEVEN_B = LLMConfig(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    layer_module="Qwen2MoTDecoderLayer",
    qk_norm=True,
    tie_word_embeddings=False,
)


def test_formula_on_the_7b_model() -> None:
    layer = 3 * 3584 * 18944 + 3584 * (3584 + 512 + 512 + 3584)
    parameters = 28 * layer + 2 * 152064 * 3584
    assert dense_parameters(SEVEN_B) == parameters
    expected = 6 * parameters * 300 + 12 * 128 * 28 * 28 * (100**2 + 200**2)
    assert training_flops(SEVEN_B, [100, 200]) == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 181.05),
        ("AMD Instinct MI300X", 1336.0),
        ("NVIDIA GeForce RTX 3070 Ti", 21.75),
        ("Some card", 0.0),
    ],
)
def test_peak_table(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak


def test_peak_of_a_cpu_is_measured_unless_stated() -> None:
    assert find_peak_tflops(torch.device("cpu"), torch.float32, stated=3.0) == 3.0
    assert 0.001 < find_peak_tflops(torch.device("cpu"), torch.float32) < 100


def test_summary_counts_tokens_waiting_and_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("echo4o.train.throughput.time.perf_counter", lambda: now[0])
    llm = tiny_config().llm
    throughput = Throughput(llm, torch.device("cpu"), max_num_tokens=20, peak=1e-6)
    batches = [make_batch(4, 6), make_batch(2, 4)]
    with throughput.waiting():
        now[0] += 1.0
    now[0] += 3.0
    with throughput.paused():
        now[0] += 100.0
    throughput.add_step(batches)
    summary = throughput.summary(world_size=2)
    assert summary["seconds_per_step"] == 4.0
    assert summary["tokens_per_sec"] == 2 * 16 / 4
    assert summary["tokens_per_step"] == 32
    assert summary["data_wait_share"] == 0.25
    assert summary["fill_ratio"] == 16 / 40
    flops = training_flops(llm, [4, 6]) + training_flops(llm, [2, 4])
    assert summary["mfu"] == pytest.approx(flops / 4 / 1e12 / 1e-6)
    assert summary["peak_memory_gb"] > 0
    throughput.reset()
    assert throughput.summary()["tokens_per_sec"] == 0
    assert "mfu" not in Throughput(llm, torch.device("cpu"), 20).summary()
