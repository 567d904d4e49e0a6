"""Reading model folders: layouts that load, and what is said about those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from echo4o.packed import PackedBatch


def tiny_config(**changes) -> BagelConfig:
    llm = LLMConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, rms_norm_eps=1e-6, rope_theta=1e4, layer_module="Qwen2MoTDecoderLayer", qk_norm=True,
        tie_word_embeddings=changes.pop("tie_word_embeddings", False),
    )  # fmt: skip
    vit = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    return BagelConfig(llm, vit, VAEConfig(ch=32), max_latent_size=4, vit_max_num_patch_per_side=4, **changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    model = Bagel(tiny_config())
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_round_trip_of_config_and_weights(folder) -> None:
    assert BagelConfig.from_pretrained(folder) == tiny_config()
    loaded = Bagel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(folder).items())


def test_sharded_weights_and_half_precision(folder) -> None:
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name].bfloat16() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = Bagel.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weights[name].bfloat16().float()) for name in names)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        Bagel.from_pretrained(folder)


def test_ema_is_preferred_and_either_can_be_asked_for(folder) -> None:
    save_file({name: torch.zeros_like(t) for name, t in weights_of(folder).items()}, folder / "ema.safetensors")
    assert Bagel.from_pretrained(folder).vae2llm.weight.abs().sum() == 0
    assert Bagel.from_pretrained(folder, weights="model").vae2llm.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="ema, model"):
        Bagel.from_pretrained(folder, weights="best")


def test_files_without_the_fixed_tables_load(folder) -> None:
    """Upstream's training checkpoints may lack the position tables: they are computed."""
    weights = weights_of(folder)
    save_file({n: t for n, t in weights.items() if "pos_embed.pos_embed" not in n}, folder / "model.safetensors")
    loaded = Bagel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_load_from_either_name(tmp_path, kept) -> None:
    model = Bagel(tiny_config(tie_word_embeddings=True))
    model.config.save_pretrained(tmp_path)
    tied = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    state = {n: t.clone() for n, t in model.state_dict().items() if n not in tied or n.endswith(kept)}
    save_file(state, tmp_path / "model.safetensors")
    loaded = Bagel.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight
    assert torch.equal(loaded.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_the_stored_table_overrules_a_stale_config(folder, caplog) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_latent_size": 32}))
    assert BagelConfig.from_pretrained(folder).max_latent_size == 4
    assert "max_latent_size is 32" in caplog.text


def test_an_original_qwen2_config_gets_upstreams_overrides(folder) -> None:
    """Published llm_config.json files say nothing of BAGEL; rope_theta may be nested (transformers 5)."""
    llm = json.loads((folder / "llm_config.json").read_text())
    for key in ("layer_module", "qk_norm", "freeze_und"):
        llm.pop(key)
    llm["tie_word_embeddings"] = True
    llm["rope_parameters"] = {"rope_theta": llm.pop("rope_theta")}
    (folder / "llm_config.json").write_text(json.dumps(llm))
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    config = BagelConfig.from_pretrained(folder).llm
    assert (config.layer_module, config.qk_norm, config.tie_word_embeddings) == ("Qwen2MoTDecoderLayer", True, False)
    assert config.rope_theta == 1e4


def break_truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def break_missing_tensor(folder: Path) -> None:
    save_file({n: t for n, t in weights_of(folder).items() if n != "llm2vae.bias"}, folder / "model.safetensors")


def break_shape(folder: Path) -> None:
    save_file(weights_of(folder) | {"llm2vae.bias": torch.zeros(3)}, folder / "model.safetensors")


def break_json(folder: Path) -> None:
    (folder / "llm_config.json").write_text("{")


def break_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_truncate, "not a complete safetensors file"),
        (break_missing_tensor, r"lacks 1 of \d+ tensors, e.g. llm2vae.bias"),
        (break_shape, r"llm2vae.bias as \(3,\)"),
        (break_json, "not valid JSON"),
        (break_no_weights, "has no ema.safetensors or model.safetensors"),
    ],
)
def test_damaged_folders_say_what_is_wrong(folder, damage, message) -> None:
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Bagel.from_pretrained(folder)


def text_only_batch(**changes) -> PackedBatch:
    fields = dict(
        sequence_length=6, sample_lens=[6], split_lens=[6], attn_modes=["causal"], packed_text_ids=torch.arange(6),
        packed_text_indexes=torch.arange(6), packed_position_ids=torch.arange(6),
        packed_label_ids=torch.arange(3), ce_loss_indexes=torch.tensor([1, 2, 3]), ce_loss_weights=torch.ones(3),
    )  # fmt: skip
    return PackedBatch(**(fields | changes))


@pytest.mark.parametrize("return_hidden", [True, False])
def test_a_batch_may_lack_any_modality_and_every_parameter_still_gets_a_gradient(return_hidden) -> None:
    model = Bagel(tiny_config())
    out = model(text_only_batch(), return_hidden=return_hidden)
    assert out.mse is None and (out.last_hidden_state is None) != return_hidden
    out.ce.mean().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []
    assert all(p.grad.isfinite().all() for _, p in trained)


def test_latents_of_the_wrong_shape_are_refused(parity) -> None:
    from .reference import Reference

    case = Reference(parity / "multiref")
    model = Bagel.from_pretrained(case.folder)
    with pytest.raises(ValueError, match=r"packed_latents must be \(111, 64\)"):
        model(case.batch(), case.latents()[:-1])


def test_growing_the_vocabulary_keeps_old_words() -> None:
    model = Bagel(tiny_config())
    before = model.language_model.lm_head.weight.clone()
    model.resize_token_embeddings(70)
    assert model.language_model.lm_head.weight.shape == (70, 32)
    assert torch.equal(model.language_model.lm_head.weight[:64], before)
    assert model(text_only_batch(packed_text_ids=torch.arange(64, 70))).ce.isfinite().all()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("llm_config.json", lambda c: {}, "llm_config.json lacks hidden_size"),
        ("llm_config.json", lambda c: [], "expected a JSON object"),
        ("llm_config.json", lambda c: c | {"hidden_size": "32"}, "hidden_size of LLMConfig must be int, not '32'"),
        ("vit_config.json", lambda c: c | {"hidden_size": "16"}, "hidden_size of ViTConfig must be int"),
        ("vit_config.json", lambda c: {"hidden_size": 16}, "vit_config.json lacks intermediate_size"),
        ("llm_config.json", lambda c: c | {"qk_norm": "false"}, "qk_norm of LLMConfig must be bool"),
    ],
)
def test_wrong_configs_name_the_entry(folder, file, change, message) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(values)))
    with pytest.raises(ValueError, match=message):
        BagelConfig.from_pretrained(folder)


def test_freeze_und_can_be_asked_for_while_loading_or_switched_later(parity) -> None:
    from .reference import Reference

    case = Reference(parity / "multiref")
    loaded, switched = Bagel.from_pretrained(case.folder, freeze_und=True), Bagel.from_pretrained(case.folder)
    switched.config.llm.freeze_und = True
    for model in (loaded, switched):
        model(case.batch(), case.latents(), noise=case.noise()).mse.mean().backward()
        frozen = [n for n, p in model.named_parameters() if "layers.0.mlp.up_proj" in n and p.grad is not None]
        assert frozen == [] and model.vae2llm.weight.grad.abs().sum() > 0


def test_empty_tensors_mean_an_absent_modality() -> None:
    model = Bagel(tiny_config())
    empty = torch.zeros(0, dtype=torch.int64)
    batch = text_only_batch(
        packed_vae_token_indexes=empty, packed_latent_position_ids=empty, packed_timesteps=torch.zeros(0),
        patchified_vae_latent_shapes=[], mse_loss_indexes=empty, packed_vit_tokens=torch.zeros(0, 588),
        packed_vit_token_indexes=empty, packed_vit_position_ids=empty, vit_token_seqlens=[],
    )  # fmt: skip
    out = model(batch, torch.zeros(0, model.config.latent_dim))
    assert out.mse is None and torch.equal(out.ce, model(text_only_batch()).ce)
