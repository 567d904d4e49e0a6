"""Faults that a folder may have: how to cause each, and what verification says of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from echo4o.checkpoint.hf.provenance import Provenance, write_provenance
from tests.checkpoint.hf.folders import INDEX, LAYER, change_json, change_tensors
from tests.train.tiny_run import write_tokenizer

EMA, ADAPTER, VAE = "ema.safetensors", "adapter_model.safetensors", "ae.safetensors"
TABLE = "latent_pos_embed.pos_embed"
NAN = float("nan")

Break = Callable[[Path], object]


def cut(name: str, share: float = 0.5) -> Break:
    def truncate(folder: Path) -> None:
        path = folder / name
        os.truncate(path, int(path.stat().st_size * share))

    return truncate


def remove(*names: str) -> Break:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def write(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def config(name: str = "config.json", **changes: object) -> Break:
    return lambda folder: change_json(folder / name, **changes)


def tensors(change: Callable[[dict], object], name: str = EMA) -> Break:
    return lambda folder: change_tensors(folder / name, change)


def set_value(name: str, value: float, index: int = 3) -> Callable[[dict], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(index, value)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-0*.safetensors"))


def vae_inside(folder: Path) -> None:
    """As lmms-engine keeps it."""
    inside = {f"vae_model.{name}": tensor for name, tensor in load_file(folder / VAE).items()}
    save_file(load_file(folder / EMA) | inside, folder / EMA)
    (folder / VAE).unlink()


def comma_too_many(folder: Path) -> None:
    """As BAGEL-7B-MoT's config.json was published first."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.rstrip()[:-1] + ",}")


def in_first_shard(change: Callable[[dict], object]) -> Break:
    return lambda folder: change_tensors(first_shard(folder), change)


def double_a_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("model-0*.safetensors"))[:2]
    tensors = load_file(first)
    change_tensors(second, lambda other: other.update(dict(list(tensors.items())[:1])))


def misplace_in_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name, *_ = index["weight_map"]
    files = sorted(set(index["weight_map"].values()) - {index["weight_map"][name]})
    index["weight_map"][name] = files[0]
    (folder / INDEX).write_text(json.dumps(index))


def forget_in_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["connector.fc1.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def other_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|a|>", "<|b|>"))


def tokenizer_without_markers(folder: Path) -> None:
    write_tokenizer(folder, ("<|im_start|>", "<|im_end|>"))
    (folder / "vocab.json").unlink()


def listed(change: Break) -> Break:
    """As after an export, with a list of files; then changed."""

    def changed(folder: Path) -> None:
        files = {
            path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
        }
        write_provenance(folder, Provenance("a", "ema", "bagel", "bfloat16", files=files))
        change(folder)

    return changed


def rename_layers(tensors: dict) -> None:
    for name in [name for name in tensors if "connector" in name]:
        tensors[name.replace("connector", "projector")] = tensors.pop(name)


ADAPTER_A = f"base_model.model.{LAYER}.lora_A.weight"
BAD: dict[str, tuple[str, Break, str, str]] = {
    # layout, what is done to it, file that is blamed, words of the error
    "no config": ("bagel", remove("*config.json"), ".", "no config"),
    "broken config": ("bagel", write("config.json", "{"), "config.json", "not valid JSON"),
    "VAE among the weights": ("bagel", vae_inside, VAE, "lies among the weights"),
    "position table of zeros": ("bagel", tensors(lambda t: t[TABLE].zero_()), EMA, "not those of the sin-cos formula"),
    "list as config": ("bagel", write("config.json", "[]"), "config.json", "list instead of an object"),
    "broken llm config": ("bagel", write("llm_config.json", "{"), "llm_config.json", "not valid JSON"),
    "broken vit config": ("bagel", write("vit_config.json", ""), "vit_config.json", "not valid JSON"),
    "text as size": ("bagel", config(max_latent_size="8"), "config.json", "max_latent_size must be int, not '8'"),
    "wrong type": ("bagel", config("llm_config.json", hidden_size="32"), "llm_config.json", "hidden_size"),
    "no layers stated": ("bagel", config("llm_config.json", num_hidden_layers=None), "llm_config.json", "lacks num_h"),
    "zero heads": ("bagel", config("llm_config.json", num_attention_heads=0), "(llm_)?config.json", "no model"),
    "stale latent size": ("bagel", config(max_latent_size=32), "config.json", "is 32, but .* holds 8 × 8"),
    "stale vit size": ("hf", config(vit_max_num_patch_per_side=70), "config.json", "is 70, but .* holds 4 × 4"),
    "other layers": ("bagel", config("llm_config.json", layer_module="Qwen2DecoderLayer"), "llm_config.json", "MoT"),
    "fewer layers": ("bagel", config("llm_config.json", num_hidden_layers=1), EMA, "have no place for"),
    "more layers": ("both", config("llm_config.json", num_hidden_layers=3), EMA, "lacks 2. of"),
    "no weights": ("bagel", remove(EMA), ".", "has no ema.safetensors or model.safetensors"),
    "no index": ("hf", remove(INDEX), ".", "no index"),
    "broken index": ("hf", write(INDEX, "{"), INDEX, "not valid JSON"),
    "empty index": ("hf", write(INDEX, "{}"), INDEX, "no weight_map"),
    "index outside": ("hf", write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'), INDEX, "not a file of this"),
    "missing shard": ("hf", remove("model-00002-*"), INDEX, "not there: model-00002"),
    "cut shard": ("hf", lambda f: cut(first_shard(f).name)(f), "model-00001.*", "cut off"),
    "doubled tensor": ("hf", double_a_tensor, "model-00002.*", "holds too"),
    "misplaced tensor": ("hf", misplace_in_index, INDEX, "says otherwise"),
    "forgotten tensor": ("hf", forget_in_index, INDEX, "connector.fc1.weight"),
    "forgotten in both": ("both", forget_in_index, INDEX, "connector.fc1.weight"),
    "extra in both": ("both", tensors(lambda t: t.update(a=torch.ones(1))), EMA, "no place for: a"),
    "lost in both": ("both", tensors(lambda t: t.pop("connector.fc1.weight")), EMA, "lacks 1 of"),
    "cut file": ("bagel", cut(EMA), EMA, "was cut off: it has .* of"),
    "cut header": ("bagel", cut(EMA, 0.001), EMA, "inside its header"),
    "empty file": ("bagel", cut(EMA, 0), EMA, "only 0 bytes"),
    "not safetensors": ("bagel", write(EMA, "hello, world" * 9), EMA, "is not a safetensors"),
    "git lfs pointer": ("both", write(EMA, "version https://git-lfs"), EMA, "Git LFS"),
    "missing tensor": ("bagel", tensors(lambda t: t.pop("llm2vae.bias")), EMA, "lacks 1 of .*llm2vae.bias"),
    "missing expert": ("bagel", tensors(lambda t: t.pop(f"{LAYER}.weight")), EMA, "lacks 1 of"),
    "extra tensor": ("bagel", tensors(lambda t: t.update(a=torch.ones(1))), EMA, "1 tensor .* no place"),
    "extra in a shard": ("hf", in_first_shard(lambda t: t.update(a=torch.ones(1))), INDEX, "no place for: a"),
    "renamed tensors": ("bagel", tensors(rename_layers), EMA, "lacks 4 of .*; holds 4 tensors"),
    "wrong shape": (
        "bagel", tensors(lambda t: t.update({"llm2vae.bias": torch.ones(3)})), EMA, r"\(3,\) instead of \(64,\)",
    ),
    "odd table": ("bagel", tensors(lambda t: t.update({TABLE: t[TABLE][:50]})), EMA, r"as \(50, 32\)"),
    "integers": (
        "bagel", tensors(lambda t: t.update({"llm2vae.bias": torch.ones(64).int()})), EMA, r"llm2vae.bias \(I32",
    ),
    "float64": (
        "hf", in_first_shard(lambda t: t.update({n: x.double() for n, x in t.items()})),
        "model-00001.*", "F64",
    ),
    "other table": ("bagel", tensors(lambda t: t[TABLE].mul_(1.1)), EMA, "sin-cos formula: latent_pos"),
    "NaN": ("bagel", tensors(set_value("vae2llm.weight", NAN)), EMA, r"not finite .*vae2llm.weight \(1\)"),
    "infinity": ("both", tensors(set_value(TABLE, float("inf"))), EMA, r"not finite .*latent_pos.*\(1\)"),
    "no VAE": ("bagel", remove(VAE), VAE, "is missing"),
    "cut VAE": ("both", cut(VAE), VAE, "was cut off"),
    "other VAE": ("bagel", tensors(lambda t: t.pop("encoder.conv_in.bias"), VAE), VAE, "lacks 1 of"),
    "VAE config": (
        "hf", config(vae_config={"ch": 64, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}), VAE, "of another shape",
    ),
    "NaN in VAE": (
        "bagel", tensors(set_value("decoder.conv_in.weight", NAN), VAE), VAE, "not finite",
    ),
    "no tokenizer": ("bagel", remove("tokenizer*", "vocab.json", "merges.txt"), "tokenizer.json", "no tokenizer"),
    "broken tokenizer": ("bagel", write("tokenizer.json", "{}"), "tokenizer.json", "no usable tokenizer"),
    "broken settings": ("bagel", write("tokenizer_config.json", "{"), "tokenizer_config.json", "not valid JSON"),
    "no markers": ("bagel", tokenizer_without_markers, "tokenizer.json", "lacks the special tokens <.vision_start"),
    "large tokenizer": ("bagel", other_tokenizer, "tokenizer.json", r"262 entries, .* 260 rows \(<.a.> is 260"),
    "broken generation": ("bagel", write("generation_config.json", "x"), "generation_config.json", "not valid JSON"),
    "eos beyond": ("bagel", config("generation_config.json", eos_token_id=9999), "generation_config.json", "9999"),
    "no remote code": ("hf", remove("modeling_bagel.py"), "config.json", "there is no modeling_bagel.py"),
    "other class": ("both", write("modeling_bagel.py", "x = 1"), "config.json", "defines no BagelForCond"),
    "broken code": ("hf", write("modeling_bagel.py", "class ("), "config.json", "is not Python"),
    "odd auto_map": ("hf", config(auto_map=["a"]), "config.json", "auto_map must be"),
    "listed, missing": ("bagel", listed(remove(EMA)), EMA, "echo4o_export.json lists it"),
    "listed, cut": ("bagel", listed(cut(EMA)), EMA, "was cut off"),
    "listed, other bytes": ("bagel", listed(tensors(set_value("vae2llm.weight", 0.5))), EMA, "SHA-256"),
    "listed, other text": ("bagel", listed(write("merges.txt", "#version: 0.3\n")), "merges.txt", "SHA-256"),
    "listed, longer": ("bagel", listed(write("merges.txt", "#version: 0.21\n")), "merges.txt", "15 bytes, .* says 14"),
    "broken list": ("bagel", write("echo4o_export.json", "{"), "echo4o_export.json", "cannot be used"),
    "no marker": ("checkpoint", remove("complete"), "complete", "interrupted"),
    "broken marker": ("checkpoint", write("complete", "{"), "complete", "interrupted"),
    "cut frozen": ("checkpoint", cut("frozen.safetensors"), "frozen.safetensors", "was cut off"),
    "lost EMA": ("checkpoint", remove("ema.trained.safetensors"), "ema.trained.safetensors", "is missing"),
    "changed optimiser": ("checkpoint", write("training.json", "[1]"), "training.json", "3 bytes instead of 2"),
    "NaN in a checkpoint": (
        "checkpoint", tensors(set_value("llm2vae.weight", NAN), "model.trained.safetensors"),
        "model.trained.safetensors", "not finite",
    ),
    "no adapter": ("adapter", remove(ADAPTER), ".", "but no adapter_model.safetensors"),
    "broken adapter config": ("adapter", write("adapter_config.json", "{"), "adapter_config.json", "cannot be used"),
    "not plain LoRA": ("adapter", config("adapter_config.json", use_dora=True), "adapter_config.json", "use_dora"),
    "other rank": ("adapter", config("adapter_config.json", r=4), ADAPTER, "of rank 3, .* r = 4"),
    "lone matrix": (
        "adapter", tensors(lambda t: t.pop(ADAPTER_A), ADAPTER), ADAPTER, "twin",
    ),
    "other base": (
        "adapter", tensors(lambda t: t.update({ADAPTER_A: torch.ones(3, 8)}), ADAPTER),
        ADAPTER, r"as \(3, 8\), the layer's weight is \(32, 32\)",
    ),
    "cut adapter": ("adapter", cut(ADAPTER), ADAPTER, "cut off"),
    "NaN in an adapter": (
        "adapter", tensors(set_value(ADAPTER_A, NAN), ADAPTER),
        ADAPTER, "not finite",
    ),
}  # fmt: skip


WARNINGS: dict[str, tuple[str, Break, str]] = {
    "shards left over": (
        "hf",
        lambda f: save_file({"a": torch.ones(1)}, f / "model-00009-of-00009.safetensors"),
        "no index",
    ),
    "zero velocity": ("bagel", tensors(lambda t: t["llm2vae.weight"].zero_()), "never been trained to draw"),
    "zero layer": ("bagel", tensors(lambda t: t["connector.fc1.weight"].zero_()), "all zero: connector.fc1.weight"),
    "no vocab.json": ("bagel", remove("vocab.json", "merges.txt"), "vocab.json and merges.txt"),
    "comma too many": ("bagel", comma_too_many, "comma"),
    "two configs": ("bagel", config(llm_config={"rope_theta": 5.0}), "rope_theta is 5.0"),
    "foreign names": (
        "bagel",
        tensors(lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)]),
        "another program's way",
    ),
    "zero adapter": (
        "adapter",
        tensors(lambda t: t[ADAPTER_A.replace("_A", "_B")].zero_(), ADAPTER),
        "change nothing",
    ),
}
