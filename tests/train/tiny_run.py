"""A BAGEL folder and settings small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from echo4o.checkpoint.weights import write_weights
from echo4o.config import RunConfig, load_config
from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from echo4o.model.vae import AutoEncoder

DATA = Path(__file__).resolve().parents[2] / "data_examples"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def tiny_config(vocab_size: int = 260) -> BagelConfig:
    return BagelConfig(
        llm=LLMConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocab_size,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            layer_module="Qwen2MoTDecoderLayer",
            qk_norm=True,
            tie_word_embeddings=False,
        ),
        vit=ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        vae=VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        max_latent_size=8,
        vit_max_num_patch_per_side=4,
    )


def write_tokenizer(folder: Path, markers: tuple[str, ...] = MARKERS) -> None:
    """Bytes and markers: 256 + 4 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(markers))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_bagel(folder: Path, config: BagelConfig | None = None) -> Path:
    """An upstream folder with random weights."""
    config = config or tiny_config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Bagel(config)
        if config.visual_gen:
            torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
        vae = AutoEncoder(config.vae or VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))
    config.save_pretrained(folder)
    write_weights(model.state_dict(), folder, "model")
    save_file(vae.state_dict(), folder / "ae.safetensors")
    write_tokenizer(folder)
    return folder


def run_settings(bagel: Path, out: Path, **changes: object) -> dict[str, object]:
    """Settings of a run of a few short steps on the example data."""
    return {
        "init_from": str(bagel),
        "dataset_config_file": str(DATA / "dataset.yaml"),
        "results_dir": str(out),
        "checkpoint_dir": str(out / "checkpoints"),
        "expected_num_tokens": 260,
        "max_num_tokens": 400,
        "max_num_tokens_per_sample": 400,
        "prefer_buffer_before": 200,
        "max_buffer_size": 4,
        "num_workers": 0,
        "total_steps": 4,
        "save_every": 2,
        "log_every": 1,
        "warmup_steps": 1,
        "lr": 1e-3,
        "ema": 0.5,
        "tensorboard": False,
        "peak_device_tflops": 1.0,
        "device": "cpu",
        "activation_checkpointing": "none",
        **changes,
    }


def run_config(bagel: Path, out: Path, **changes: object) -> RunConfig:
    return load_config((), run_settings(bagel, out, **changes))
