"""Models assembled from Hugging Face parts, and architecture-only starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from echo4o.checkpoint import folders
from echo4o.config import ConfigError, load_config
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder
from echo4o.packed import PackedBatch
from echo4o.train.trainer import train
from tests.train.tiny_run import run_config, run_settings, tiny_config, write_bagel, write_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen2 and a SigLIP made by transformers itself, and a VAE."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("parts")
    config = tiny_config()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        llm = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=264,
                rope_theta=5000.0,
                tie_word_embeddings=False,
            )
        )
        vit = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
            )
        )
        vae = AutoEncoder(config.vae)
    llm.save_pretrained(folder / "llm")
    vit.save_pretrained(folder / "vit")
    write_tokenizer(folder / "llm")
    save_file(vae.state_dict(), folder / "ae.safetensors")
    return {"llm": folder / "llm", "vit": folder / "vit", "vae": folder / "ae.safetensors", "model": llm}


def parts_settings(parts: dict[str, Path], out: Path, **changes: object) -> dict[str, object]:
    settings = run_settings(out, out, **changes)
    settings.pop("init_from")
    return settings | {
        "llm_path": str(parts["llm"]),
        "vit_path": str(parts["vit"]),
        "vae_path": str(parts["vae"]),
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 4,
        **changes,
    }


def test_train_from_parts(parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(load_config((), parts_settings(parts, tmp_path, total_steps=1, lr=0.1, warmup_steps=1)))
    text = capsys.readouterr().out
    assert "weights from parts" in text and "copied from understanding" in text and str(parts["llm"]) in text
    # The first update of a warm-up has learning rate 0: these are the assembled weights.
    model = Bagel.from_pretrained(folders.latest(tmp_path / "checkpoints"), weights="model")
    state = model.state_dict()
    q = "language_model.model.layers.0.self_attn.q_proj"
    assert torch.equal(state[f"{q}.weight"], parts["model"].state_dict()["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(state[f"{q}_moe_gen.weight"], state[f"{q}.weight"])
    assert model.config.llm.rope_theta == 5000.0
    assert model.config.num_vit_layers == 1


def test_assembled_language_model_computes_what_the_original_does(parts: dict[str, Path], tmp_path: Path) -> None:
    settings = parts_settings(parts, tmp_path, total_steps=1, warmup_steps=1, llm_qk_norm=False)
    train(load_config((), settings))
    model = Bagel.from_pretrained(folders.latest(tmp_path / "checkpoints"), weights="model").eval()
    ids = torch.tensor([5, 9, 77, 130, 4])
    count = len(ids)
    batch = PackedBatch(
        sequence_length=count,
        sample_lens=[count],
        split_lens=[count],
        attn_modes=["causal"],
        packed_text_ids=ids,
        packed_text_indexes=torch.arange(count),
        packed_position_ids=torch.arange(count),
    )
    with torch.no_grad():
        found = model.language_model.lm_head(model(batch).last_hidden_state)
        expected = parts["model"].eval()(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["llm_path", "vit_path", "vae_path"])
def test_missing_part_names_its_flag(parts: dict[str, Path], tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        train(load_config((), parts_settings(parts, tmp_path, **{part: str(tmp_path / "nowhere")})))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("llm_config.json", "{}"),
        ("llm_config.json", "[]"),
        ("llm_config.json", '"text"'),
        ("llm_config.json", "without heads"),
        ("llm_config.json", "text for a number"),
        ("vit_config.json", "[1]"),
        ("config.json", "[]"),
    ],
)
def test_unusable_model_config_is_one_error_with_folder_and_file(tmp_path: Path, file: str, content: str) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    values = json.loads((bagel / "llm_config.json").read_text())
    if content == "without heads":
        values.pop("num_attention_heads")
        content = json.dumps(values)
    elif content == "text for a number":
        content = json.dumps(values | {"hidden_size": "many"})
    (bagel / file).write_text(content)
    with pytest.raises(ConfigError) as error:
        train(run_config(bagel, tmp_path / "out"))
    assert str(bagel) in str(error.value) and file in str(error.value)


def test_random_start_is_repeatable_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bagel = write_bagel(tmp_path / "bagel")
    states = []
    for name in ("one", "two"):
        train(run_config(bagel, tmp_path / name, init_weights="random", total_steps=1))
        states.append(Bagel.from_pretrained(folders.latest(tmp_path / name / "checkpoints")).state_dict())
    assert "RANDOM" in capsys.readouterr().out
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["vae2llm.weight"], Bagel.from_pretrained(bagel).state_dict()["vae2llm.weight"])
