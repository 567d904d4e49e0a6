"""Random tiny models, and every kind of folder that training or other programs leave of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from echo4o.checkpoint import writer
from echo4o.checkpoint.adapters import AdapterConfig, write_adapter_config
from echo4o.checkpoint.weights import write_weights
from echo4o.model import Bagel, BagelConfig
from echo4o.model.config import LAYER_MODULES
from echo4o.train.ema import EMA
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.lora import add_lora
from echo4o.train.optim import build_optimizer
from echo4o.train.selection import choose_trainable, trainable_parameters
from tests.train.tiny_run import tiny_config, write_bagel, write_tokenizer

#: Kinds of folders.
RUNS = ("whole", "frozen", "lora")
FOREIGN = ("single", "sharded", "wrapped", "partial", "vae_inside")
#: LoRA's rank.
RANK = 2


@dataclass(frozen=True)
class Made:
    """A folder, and the model that it stands for.

    Attributes:
        model: with float32 weights.
        base: to pass as ``--base``, or None.
    """

    folder: Path
    model: Bagel
    base: Path | None = None


def random_config(rng: random.Random) -> BagelConfig:
    """MoT, MoE or dense; with or without ViT and drawing; tied or not; other sizes each time."""
    heads = rng.choice((2, 4))
    hidden = heads * 8 * rng.choice((1, 2))
    config = tiny_config()
    llm = replace(
        config.llm,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=rng.choice((1, 2)),
        intermediate_size=rng.choice((24, 40)),
        num_hidden_layers=rng.choice((1, 2)),
        rope_theta=rng.choice((1e4, 1e6)),
        layer_module=rng.choice(LAYER_MODULES),
        qk_norm=rng.random() < 0.7,
        tie_word_embeddings=rng.random() < 0.4,
    )
    with_vit = rng.random() < 0.7
    rope = with_vit and rng.random() < 0.3
    side = rng.choice((4, 6))
    vit = replace(config.vit, image_size=14 * side) if config.vit else None
    return replace(
        config,
        llm=llm,
        vit=vit if with_vit else None,
        visual_und=with_vit,
        visual_gen=not with_vit or rng.random() < 0.85,
        max_latent_size=rng.choice((4, 8)),
        vit_max_num_patch_per_side=side if rope else rng.choice((4, side)),
        vit_rope=rope,
    )


def make(kind: str, root: Path, config: BagelConfig, seed: int, weights: str = "ema") -> Made:
    """A folder of one of the kinds `RUNS` and `FOREIGN`, whose model is that of `weights` where there are two."""
    torch.manual_seed(seed)
    if kind in RUNS:
        return _run(kind, root, config, weights)
    model = _random(config)
    folder = write_bagel(root / "base", config) if kind == "partial" else write_bagel(root / kind, config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "partial":
        return _partial(root, folder, model, state)
    (folder / "model.safetensors").unlink()
    if kind == "sharded":
        assert len(write_weights(state, folder, "model", max_shard_bytes=40_000)) > 2
    elif kind == "wrapped":
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    elif kind == "vae_inside" and config.visual_gen:
        from safetensors.torch import load_file

        inside = {f"vae_model.{name}": tensor for name, tensor in load_file(folder / "ae.safetensors").items()}
        save_file(state | inside, folder / "model.safetensors")
        (folder / "ae.safetensors").unlink()
    else:
        write_weights(state, folder, "ema")
    return Made(folder, model)


def _random(config: BagelConfig) -> Bagel:
    model = Bagel(config)
    tables = set(model.table_names())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in tables:
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.08)
    return model


def _partial(root: Path, base: Path, model: Bagel, state: dict) -> Made:
    """Upstream's training checkpoint without its ViT, tables, configs, tokenizer and VAE."""
    folder = root / "0001000"
    folder.mkdir()
    left_out = ("vit_model.", "connector.", "vit_pos_embed.", "latent_pos_embed.")
    save_file(
        {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}, folder / "ema.safetensors"
    )
    (folder / "optimizer.00000-of-00001.pt").write_bytes(b"not read")
    filled = Bagel.from_pretrained(base).state_dict()
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if name.startswith(left_out):
                parameter.copy_(filled[name])
    return Made(folder, model, base)


def _run(kind: str, root: Path, config: BagelConfig, weights: str) -> Made:
    """A training checkpoint, written by the run's own writer."""
    base = write_bagel(root / "base", config)
    model = Bagel.from_pretrained(base)
    layers = add_lora(model, rank=RANK, targets=("und",)) if kind == "lora" else []
    choose_trainable(model, **({"train_only": ("und",)} if kind == "frozen" else {}))
    engine = SingleProcessEngine("cpu")
    engine.prepare(model, lambda module: build_optimizer(module, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-15))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    average = EMA(engine.trained(), 0.5)
    for shadow in average.shadow.values():
        shadow.add_(torch.randn_like(shadow) * 0.05)

    def write_assets(folder: Path) -> None:
        config.save_pretrained(folder)
        write_tokenizer(folder)
        if config.visual_gen:
            (folder / "ae.safetensors").write_bytes((base / "ae.safetensors").read_bytes())
        (folder / "config.yaml").write_text(json.dumps({"lr": 1e-3, "total_steps": 7}))
        if kind == "lora":
            write_adapter_config(folder, AdapterConfig(str(base), RANK, 2.0 * RANK, 0.0, tuple(layers)))

    folder = writer.save(root / "checkpoints", writer.Progress(7, {}, {}), engine, average, write_assets)
    if weights == "ema":
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.copy_(average.shadow[_known(name, average)].reshape(parameter.shape))
    if kind == "lora":
        model = _merged(model, base)
    return Made(folder, model)


def _known(name: str, average: EMA) -> str:
    from echo4o.checkpoint.names import public_name

    return name if name in average.shadow else public_name(name)


def _merged(adapted: Bagel, base: Path) -> Bagel:
    """Adapters added by peft's own formula, W + alpha / rank · B A with alpha twice the rank."""
    model = Bagel.from_pretrained(base)
    own = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(adapted.named_modules())
    with torch.no_grad():
        for name, module in modules.items():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                own[f"{name}.weight"].add_(2.0 * (b @ a))
    return model
