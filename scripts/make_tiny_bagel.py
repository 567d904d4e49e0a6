"""python scripts/make_tiny_bagel.py --out runs/tiny_bagel

Builds a tiny BAGEL in upstream's folder layout, in seconds: a tokenizer trained on the example texts, a language model
and a vision tower with random weights, and the tiny autoencoder that was trained on the example pictures
(``data_examples/tiny_vae``; ``--train-vae`` trains another in ten minutes). The folder goes wherever a BAGEL-7B-MoT
folder goes: ``echo4o train configs/tiny_cpu.yaml --init_from runs/tiny_bagel``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from echo4o.model import Bagel, BagelConfig
from echo4o.model.config import LLMConfig, VAEConfig, ViTConfig
from echo4o.model.vae import AutoEncoder

EXAMPLES = Path(__file__).resolve().parents[1] / "data_examples"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
VOCAB_SIZE = 512  # 256 bytes, the special tokens, and merges for the few words of the example task
# Qwen2's split into words: contractions, letters, single digits, punctuation, white space.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATCH_SIZE = 14


def example_texts(folder: Path) -> Iterator[str]:
    """Every instruction, caption, question and answer of the example data."""
    for path in sorted(folder.rglob("*.parquet")):
        names = [name for name in pq.read_schema(path).names if name in ("instruction_list", "captions")]
        for row in pq.read_table(path, columns=names).to_pylist():
            for step in row.get("instruction_list") or []:
                yield from step
            yield from json.loads(row.get("captions") or "{}").values()
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row.get("instruction", "")
            yield from (turn["value"] for turn in row.get("conversations", []))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE as Qwen2's, so that any text can be encoded; nothing is added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """``tokenizer.json``, ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` of a Qwen2 tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
    }
    write_json(folder / "tokenizer_config.json", config)


def tiny_config(vocab_size: int, vae: VAEConfig, hidden: int, layers: int, heads: int) -> BagelConfig:
    """A BAGEL that trains in minutes on a CPU; every switch has BAGEL-7B-MoT's value."""
    llm = LLMConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=vocab_size,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        layer_module="Qwen2MoTDecoderLayer",
        qk_norm=True,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    vit = ViTConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,  # of which vit_select_layer = -2 leaves three
        num_attention_heads=4,
        image_size=8 * PATCH_SIZE,
        patch_size=PATCH_SIZE,
    )
    return BagelConfig(
        llm=llm,
        vit=vit,
        vae=vae,
        latent_patch_size=2,
        max_latent_size=8,
        vit_max_num_patch_per_side=8,
        vit_select_layer=-2,
    )


def check_divisible(hidden: int, heads: int) -> None:
    """Position tables take hidden sizes that are multiples of four, rotary embeddings even heads."""
    if hidden % 4 or hidden % heads or (hidden // heads) % 2 or (heads > 1 and heads % 2):
        raise SystemExit(
            f"--hidden {hidden} and --heads {heads} do not fit: hidden must be a multiple of 4 and of heads, "
            "a head's width even, and heads 1 or even (e.g. --hidden 128 --heads 4)"
        )


def copy_vae(source: Path, folder: Path) -> VAEConfig:
    """Put the autoencoder into the folder in float32, as published ones are; returns its architecture."""
    vae = AutoEncoder.from_pretrained(source)
    save_file(vae.state_dict(), folder / "ae.safetensors", metadata={"format": "pt"})
    return vae.config


def build(folder: Path, vae: Path, data: Path, hidden: int, layers: int, heads: int, seed: int) -> Bagel:
    """Write the folder; returns the model in it."""
    check_divisible(hidden, heads)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(list(example_texts(data)))
    save_tokenizer(tokenizer, folder)
    config = tiny_config(tokenizer.get_vocab_size(), copy_vae(vae, folder), hidden, layers, heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Bagel(config)
    model.init_moe()
    config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "ema.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    write_json(folder / "generation_config.json", generation)
    return model


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--vae", type=Path, default=EXAMPLES / "tiny_vae", help="folder or file of a trained autoencoder"
    )
    parser.add_argument("--data", type=Path, default=EXAMPLES, help="example data whose texts the tokenizer learns")
    parser.add_argument("--train-vae", action="store_true", help="train an autoencoder instead of copying --vae")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vae = arguments.vae
    if arguments.train_vae:
        import train_tiny_vae

        vae = arguments.out / "vae"
        train_tiny_vae.save(train_tiny_vae.train(arguments.vae_steps, arguments.seed), vae)
        train_tiny_vae.report(vae)
    model = build(
        arguments.out, vae, arguments.data, arguments.hidden, arguments.layers, arguments.heads, arguments.seed
    )
    if arguments.train_vae:
        shutil.rmtree(vae)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: {count / 1e6:.1f} M parameters, {model.config.llm.vocab_size} tokens")
    for path in sorted(arguments.out.iterdir()):
        print(f"  {path.name:<28} {path.stat().st_size / 1e3:>9.1f} kB")


if __name__ == "__main__":
    main()
