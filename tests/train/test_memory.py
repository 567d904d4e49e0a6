"""Estimates against measured tensors, what fits which machine, and the refusal of what cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from echo4o.checkpoint.pieces import piece_of
from echo4o.config import ConfigError, RunConfig, load_config, split_names
from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from echo4o.train.banner import banner, lora_text
from echo4o.train.ema import EMA
from echo4o.train.lora import add_lora
from echo4o.train.memory import (
    HostEstimate,
    MemoryEstimate,
    _free_of_container,
    available_host_memory,
    estimate_memory,
    host_estimate,
    refuse_if_it_cannot_fit,
)
from echo4o.train.optim import build_optimizer
from echo4o.train.parallelize import shard as fully_shard_model
from echo4o.train.selection import choose_trainable, trainable_parameters
from tests.train.tiny_run import tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MACHINES = sorted(CONFIGS.glob("bagel_7b_lora_*.yaml"))


def bagel_7b(freeze_und: bool) -> BagelConfig:
    """BAGEL-7B-MoT's published architecture."""
    return BagelConfig(
        llm=LLMConfig(
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
            freeze_und=freeze_und,
        ),
        vit=ViTConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=980,
            patch_size=14,
        ),
        vae=VAEConfig(),
        max_latent_size=64,
        vit_max_num_patch_per_side=70,
    )


def on_meta(config: BagelConfig, lora_rank: int = 0, frozen: torch.dtype = torch.bfloat16) -> Bagel:
    with torch.device("meta"):
        model = Bagel(config)
    if lora_rank:
        add_lora(model, rank=lora_rank)
    choose_trainable(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    return model


def num_bytes(tensors: Iterable[Tensor]) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def measured(model: Bagel) -> dict[str, int]:
    """Bytes of tensors after a step with a gradient for everything that trains."""
    optimizer = build_optimizer(model, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15)
    trained = trainable_parameters(model)
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    ema = EMA({name: piece_of(p) for name, p in trained.items()}, 0.9)
    states = [state for slots in optimizer.state.values() for state in slots.values()]
    return {
        "weights": num_bytes([*model.parameters(), *model.buffers()]),
        "gradients": num_bytes(p.grad for p in trained.values() if p.grad is not None),
        "optimizer": num_bytes(states),
        "ema": num_bytes(ema.shadow.values()),
    }


@pytest.mark.parametrize(("lora_rank", "freeze_und"), [(0, False), (0, True), (4, True)])
def test_one_process_holds_what_was_estimated(lora_rank: int, freeze_und: bool) -> None:
    model = on_meta(tiny_config().with_freeze_und(freeze_und), lora_rank)
    estimate = estimate_memory(model, model.config, 100, "none", 4)
    for part, size in measured(model.to_empty(device="cpu")).items():
        assert estimate.parts()[part] == pytest.approx(size, rel=0.1), part
    assert estimate.on_host == frozenset() and estimate.device == estimate.total


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("num_shards", [2, 3])
def test_a_rank_holds_what_was_estimated(lora_rank: int, num_shards: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = on_meta(tiny_config().with_freeze_und(True), lora_rank)
    estimate = estimate_memory(model, model.config, 100, "none", 4, shard=num_shards, gathered="blocks")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_shards)
    try:
        fully_shard_model(model, init_device_mesh("cpu", (num_shards,)), MixedPrecisionPolicy())
        found = measured(model.to_empty(device="cpu"))
    finally:
        dist.destroy_process_group()
    for part, size in found.items():
        assert estimate.parts()[part] == pytest.approx(size, rel=0.1), part
    assert estimate.working > 0


def test_eight_bit_states_take_a_quarter() -> None:
    model = on_meta(bagel_7b(freeze_und=True))
    states = {
        kind: estimate_memory(model, model.config, 1, "full", 2, optimizer=kind) for kind in ("adamw", "adamw_8bit")
    }
    assert states["adamw_8bit"].optimizer == pytest.approx(states["adamw"].optimizer / 4, rel=0.05)


def test_what_is_kept_in_host_memory_is_not_on_the_device() -> None:
    model = on_meta(tiny_config(), lora_rank=4)
    options = {"num_tokens": 100, "activation_checkpointing": "full", "compute_bytes": 2}
    plain = estimate_memory(model, model.config, **options)
    average = estimate_memory(model, model.config, **options, ema_offload=True)
    assert average.device == plain.device - plain.ema and average.total == plain.total
    streamed = estimate_memory(model, model.config, **options, cpu_offload=True, gathered="blocks")
    assert streamed.device == streamed.working + streamed.activations
    host = host_estimate(streamed, ranks_on_node=2)
    assert host.state == 2 * (streamed.total - streamed.device)
    assert host.snapshot == 2 * (streamed.gradients + streamed.optimizer + streamed.ema)
    assert host_estimate(streamed, async_save=False).snapshot == 0
    assert host_estimate(plain).state == 0
    assert host_estimate(plain, on_cpu=True).state == plain.total - plain.activations


# ---------------------------------------------------------------- machines


def estimate_of(config: RunConfig, num_processes: int) -> MemoryEstimate:
    training = config.training
    model = on_meta(bagel_7b(training.freeze_und), training.lora_rank)
    return estimate_memory(
        model,
        model.config,
        config.data.max_num_tokens,
        training.activation_checkpointing,
        2,
        shard=num_processes,
        gathered="blocks" if num_processes > 1 or training.cpu_offload else "none",
        cpu_offload=training.cpu_offload,
    )


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem.removeprefix("bagel_7b_lora_"))
def test_shipped_configs_fit_their_machines_as_their_comments_say(path: Path) -> None:
    found = re.search(r"_(\d+)x(\d+)gb", path.stem)
    assert found
    config = load_config(path)
    assert split_names(config.training.lora_targets) == ("gen",)
    estimate = estimate_of(config, num_processes=int(found[1]))
    # Room for the VAE at work, CUDA's own, and what the allocator cannot use.
    assert estimate.device + 6e9 < int(found[2]) * 1e9
    comment = re.sub(r"\n# ", " ", path.read_text().partition("\nmodel:")[0])
    assert f"{estimate.device / 1e9:.1f} GB" in comment and f"{config.data.max_num_tokens:,} tokens" in comment


def test_full_fine_tune_fits_eight_gpus_as_its_comment_says() -> None:
    path = CONFIGS / "bagel_7b_multiref.yaml"
    estimate = estimate_of(load_config(path), num_processes=8)
    comment = path.read_text().partition("\nmodel:")[0]
    assert f"{estimate.device / 1e9:.1f} GB" in comment
    assert f"{host_estimate(estimate, ranks_on_node=8).total / 1e9:.0f} GB of host memory" in re.sub(
        r"\n# ", " ", comment
    )


def test_bagel_7b_has_the_published_tensors(shared: Path) -> None:
    import json

    manifest = json.loads((shared / "manifest" / "bagel_7b_mot.json").read_text())["model"]
    with torch.device("meta"):
        state = Bagel(bagel_7b(freeze_und=False)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest


# ---------------------------------------------------------------- the host, and the banner


def test_what_clearly_does_not_fit_is_refused_with_remedies() -> None:
    estimate = HostEstimate(state=80, snapshot=15, processes=5)
    refuse_if_it_cannot_fit(estimate, None)
    refuse_if_it_cannot_fit(estimate, 96)
    with pytest.raises(ConfigError, match="--async_save False.*--lora_rank 16.*--cpu_offload False"):
        refuse_if_it_cannot_fit(estimate, 90)
    with pytest.raises(ConfigError) as error:
        refuse_if_it_cannot_fit(HostEstimate(state=0, snapshot=0, processes=100), 50)
    assert "async_save" not in str(error.value) and "cpu_offload" not in str(error.value)


def test_free_memory_of_machine_and_container(tmp_path: Path) -> None:
    assert (available_host_memory() or 0) > 1e7
    assert _free_of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    assert _free_of_container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert _free_of_container(tmp_path) is None


def test_banner_states_what_trains_and_where_memory_goes() -> None:
    model = on_meta(tiny_config(), lora_rank=4)
    estimate = estimate_memory(model, model.config, 100, "full", 2, ema_offload=True)
    layers = [name for name, _ in model.named_modules() if name.endswith("moe_gen")]
    text = banner(
        source="x",
        unexpected=[],
        model=model,
        memory=estimate,
        available=10,
        facts={"LoRA": lora_text(4, 0.0, 0.05, ("gen",), layers)},
    )
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    assert f"{trained:,} train" in text
    assert f"LoRA                   rank 4, alpha 8, dropout 0.05, beside {len(layers)} layers (gen)" in text
    assert "MB optimizer" in text and "in host memory" in text and "MB ema" in text
    assert "WARNING: only" in text and "--lora_rank 16" in text
