"""Adapters on disk: the round trip, merging, other people's formats, and complete folders out of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from echo4o.checkpoint.adapters import (
    AdapterConfig,
    assets_of,
    find_adapter,
    load_bagel,
    merge_adapter,
    read_adapter,
    read_adapter_config,
    write_adapter_config,
)
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.merging import write_merged
from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter, public_name
from echo4o.cli import app
from echo4o.data.tokenizer import load_tokenizer
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model import Bagel
from echo4o.packed import PackedBatch
from echo4o.train.lora import add_lora
from echo4o.train.selection import choose_trainable, trainable_parameters
from tests.train.tiny_run import write_bagel, write_tokenizer

RANK, ALPHA = 3, 5.0
NORM = "language_model.model.layers.0.self_attn.q_norm_moe_gen.weight"


@dataclass
class Trained:
    """A base, a checkpoint of adapters as a run writes it, and what the model gave before it was saved."""

    base: Path
    folder: Path
    outputs: dict[str, Tensor]
    base_output: Tensor
    layers: list[str]


def batch() -> PackedBatch:
    """Five text tokens and a 2 × 2 image with a loss, so that both experts and the heads have a say."""
    return PackedBatch(
        sequence_length=9,
        sample_lens=[9],
        split_lens=[5, 4],
        attn_modes=["causal", "noise"],
        packed_text_ids=torch.tensor([5, 9, 77, 130, 4]),
        packed_text_indexes=torch.arange(5),
        packed_position_ids=torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5]),
        packed_vae_token_indexes=torch.arange(5, 9),
        packed_latent_position_ids=torch.tensor([0, 1, 8, 9]),
        packed_timesteps=torch.full((4,), 0.3),
        patchified_vae_latent_shapes=[(2, 2)],
        mse_loss_indexes=torch.arange(5, 9),
    )


@torch.no_grad()
def output_of(model: Bagel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, model.config.latent_dim, generator=generator) for _ in range(2))
    output = model.eval()(batch(), latents, noise)
    assert output.mse is not None and output.last_hidden_state is not None
    return torch.cat([output.mse.flatten(), output.last_hidden_state.flatten().float()])


def write_adapters(folder: Path, model: Bagel, kind: str) -> None:
    named = {public_name(name): p.detach().clone() for name, p in trainable_parameters(model).items()}
    adapters = {ADAPTER_PREFIX + name: p for name, p in named.items() if is_adapter(name)}
    save_file(adapters, folder / f"adapter_{kind}.safetensors")
    save_file({name: p for name, p in named.items() if not is_adapter(name)}, folder / f"{kind}.trained.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("lora")
    base, folder = write_bagel(root / "bagel"), root / "0000100"
    model = Bagel.from_pretrained(base)
    before = output_of(model)
    layers = add_lora(model, rank=RANK, alpha=ALPHA, targets=("gen", "connector", "vae2llm"))
    choose_trainable(model, train_only=(NORM,))
    model.config.save_pretrained(folder)
    write_tokenizer(folder)
    shutil.copyfile(base / "ae.safetensors", folder / "ae.safetensors")
    outputs = {}
    for seed, kind in enumerate(("model", "ema")):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.normal_(mean=float(parameter.ndim < 2), std=0.1, generator=generator)
        write_adapters(folder, model, kind)
        outputs[kind] = output_of(model)
    config = AdapterConfig(str(base), RANK, ALPHA, 0.0, tuple(layers), base_weights="model")
    write_adapter_config(folder, config)
    assert read_adapter_config(folder) == config
    return Trained(base, folder, outputs, before, layers)


def copy_of(trained: Trained, tmp_path: Path, **changes: object) -> Path:
    """The checkpoint with other entries in its adapter_config.json."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize(("weights", "kind"), [(None, "ema"), ("ema", "ema"), ("model", "model")])
def test_loading_changes_the_output_exactly_as_measured_before_saving(trained: Trained, weights, kind) -> None:
    found = output_of(load_bagel(trained.folder, weights=weights))
    torch.testing.assert_close(found, trained.outputs[kind], rtol=1e-5, atol=1e-5)
    change = (trained.outputs[kind] - trained.base_output).abs().max()
    assert change > 1e-2  # the test would see an adapter without effect


def test_pipeline_has_the_adapters_effect(trained: Trained) -> None:
    pipe = Echo4oPipeline.from_pretrained(trained.folder, dtype="float32", device="cpu")
    torch.testing.assert_close(output_of(pipe.model), trained.outputs["ema"], rtol=1e-5, atol=1e-5)
    assert pipe.vae is not None


def test_merging_into_a_model_and_taking_it_away(trained: Trained) -> None:
    model = Bagel.from_pretrained(trained.base)
    adapter = read_adapter(trained.folder, "model")
    assert sorted(adapter.layers()) == sorted(trained.layers)
    merge_adapter(model, adapter)
    name = f"{trained.layers[0]}.weight"
    a, b = (
        load_file(find_adapter(trained.folder, "model"))[f"{ADAPTER_PREFIX}{trained.layers[0]}.lora_{x}.weight"]
        for x in "AB"
    )  # type: ignore[arg-type]
    before = Bagel.from_pretrained(trained.base).state_dict()
    torch.testing.assert_close(model.state_dict()[name], before[name] + ALPHA / RANK * b @ a, rtol=0, atol=1e-6)
    merge_adapter(model, adapter, scale=-ALPHA / RANK)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


def test_bfloat16_is_rounded_once(trained: Trained) -> None:
    exact, rounded = load_bagel(trained.folder).state_dict(), load_bagel(trained.folder, dtype="bfloat16").state_dict()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_ordinary_folders_are_loaded_as_they_are(trained: Trained) -> None:
    assert torch.equal(output_of(load_bagel(trained.base)), trained.base_output)
    assert assets_of(trained.base) == trained.base


def test_vocabulary_that_grew_before_training(trained: Trained, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    path = folder / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 263}))
    model = load_bagel(folder)
    table = model.language_model.model.embed_tokens.weight
    assert table.shape[0] == 263
    torch.testing.assert_close(table[260:], table[:260].mean(0).expand(3, -1))
    grown = Bagel.from_pretrained(trained.base)
    grown.resize_token_embeddings(263)
    torch.testing.assert_close(table, grown.language_model.model.embed_tokens.weight)


# ---------------------------------------------------------------- peft


def test_peft_loads_the_folder(trained: Trained) -> None:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(trained.folder))
    assert (config.peft_type, config.base_model_name_or_path) == ("LORA", str(trained.base))
    model = Bagel.from_pretrained(trained.base)
    model.load_state_dict(load_file(trained.folder / "model.trained.safetensors"), strict=False)
    adapted = PeftModel.from_pretrained(model, str(trained.folder))
    found = output_of(adapted.base_model.model)
    torch.testing.assert_close(found, trained.outputs["model"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found, trained.outputs["model"])


def test_folder_that_peft_wrote_is_loaded_beside_its_base(trained: Trained, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = Bagel.from_pretrained(trained.base)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj_moe_gen", "llm2vae"]))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.1)
    adapted.save_pretrained(str(tmp_path / "peft"))
    expected = output_of(model)
    found = output_of(load_bagel(tmp_path / "peft", base=trained.base))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert assets_of(tmp_path / "peft", trained.base) == trained.base
    with pytest.raises(CheckpointError, match="--base FOLDER"):
        load_bagel(tmp_path / "peft")


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "no/where"}, "adapters of no/where, which is not there"),
        ({"use_dora": True}, "says use_dora True, which is more than plain LoRA: merge it with peft"),
        ({"peft_type": "IA3"}, "says peft_type 'IA3'"),
        ({"alpha_pattern": {"q": 1}}, "says alpha_pattern"),
        ({"r": None}, "adapter_config.json cannot be read"),
        ({"base_weights": "ema"}, "has no ema.safetensors"),
    ],
)
def test_what_cannot_be_merged_names_the_remedy(trained: Trained, tmp_path: Path, changes, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_bagel(copy_of(trained, tmp_path, **changes))


def test_missing_average_and_foreign_base_are_refused(trained: Trained, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    (folder / "adapter_ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no adapter_ema.safetensors; take other weights"):
        load_bagel(folder, weights="ema")
    torch.testing.assert_close(output_of(load_bagel(folder)), trained.outputs["model"], rtol=1e-5, atol=1e-5)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"{ADAPTER_PREFIX}{trained.layers[0]}.lora_B.weight"
    save_file(tensors | {name: torch.zeros(7, RANK)}, path)
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        load_bagel(folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match="is no adapter of linear layers"):
        load_bagel(folder)
    with pytest.raises(CheckpointError, match="base is no/where, which is not a folder"):
        load_bagel(trained.folder, base="no/where")


# ---------------------------------------------------------------- complete folders


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_merged_folder_is_a_complete_bagel(trained: Trained, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", str(trained.folder), "--out", str(out), "--weights", kind])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        f"{kind}.safetensors", "ae.safetensors", "config.json", "llm_config.json", "vit_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    found = output_of(Bagel.from_pretrained(out))
    torch.testing.assert_close(found, trained.outputs[kind], rtol=1e-5, atol=1e-5)
    assert set(load_file(out / f"{kind}.safetensors")) == set(load_file(trained.base / "model.safetensors"))
    assert len(load_tokenizer(out)) == 260
    Echo4oPipeline.from_pretrained(out, device="cpu")


def test_merged_numbers_are_the_bases_or_those_asked_for(trained: Trained, tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    shutil.copytree(trained.base, base)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, base / "model.safetensors")
    kept = load_file(write_merged(trained.folder, tmp_path / "kept", base=base))
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    wide = load_file(write_merged(trained.folder, tmp_path / "wide", base=base, dtype="float32"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(kept[name], tensor.bfloat16()) for name, tensor in wide.items())


def test_merge_refuses_what_it_cannot_do_and_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "there").mkdir()
    for argv, message in (
        ([str(trained.folder), "--out", str(tmp_path / "there")], "exists already; choose another --out"),
        ([str(trained.base), "--out", str(tmp_path / "out")], "there are no adapters in it to merge"),
        ([str(trained.folder), "--out", str(tmp_path / "out"), "--base", "no/where"], "base is no/where"),
    ):
        result = CliRunner().invoke(app, ["merge", *argv])
        assert result.exit_code == 1 and message in result.output.replace("\n", " ")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("echo4o.checkpoint.merging.create_file", full)
    with pytest.raises(CheckpointError, match="No space left on device. Make room there"):
        write_merged(trained.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
