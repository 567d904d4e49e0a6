"""Weights files: names, tied tensors, shards; parts of a new model from Hugging Face folders."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.checkpoint.weights import load_llm_part, load_vit_part, patch_convolution_to_linear, write_weights
from echo4o.model import Bagel, BagelConfig
from echo4o.model.pretrained import iter_tensors
from tests.train.tiny_run import tiny_config


def test_single_file_round_trip_with_tied_and_sliced_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "slice": base[1:, :2], "half": base.to(torch.bfloat16)}
    files = write_weights(tensors, tmp_path, "ema")
    assert [file.name for file in files] == ["ema.safetensors"]
    found = load_file(files[0])
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema.safetensors"]


def test_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    files = write_weights(tensors, tmp_path, "model", max_shard_bytes=80)
    assert [file.name for file in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    found = dict(iter_tensors(files[-1]))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert json.loads(files[-1].read_text())["metadata"]["total_size"] == 200


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_weights({"a": torch.zeros(4)}, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            write_weights({"a": torch.ones(10_000)}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.zeros(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def qwen2_tensors(config: BagelConfig) -> dict[str, torch.Tensor]:
    """What a plain Qwen2 file holds: no experts, no norms of queries and keys."""
    state = Bagel(config).language_model.state_dict()
    return {
        k: torch.randn_like(v) for k, v in state.items() if not any(x in k for x in ("moe_gen", "q_norm", "k_norm"))
    }


def test_language_model_part_then_copied_experts(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = qwen2_tensors(config)
    save_file(tensors, tmp_path / "model.safetensors")
    model = Bagel(config)
    fresh = load_llm_part(model, tmp_path)
    assert fresh and all("moe_gen" in name or "_norm" in name for name in fresh)
    model.init_moe()
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[f"language_model.{name}"], tensor)
    q = "language_model.model.layers.1.self_attn.q_proj"
    assert torch.equal(state[f"{q}_moe_gen.weight"], state[f"{q}.weight"])


def test_language_model_part_without_a_tensor_is_refused(tmp_path: Path) -> None:
    tensors = qwen2_tensors(tiny_config())
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight"):
        load_llm_part(Bagel(tiny_config()), tmp_path)


def test_vision_part_converts_the_convolution_and_drops_the_rest(tmp_path: Path) -> None:
    config = tiny_config()
    model = Bagel(config)
    hidden, patch = config.vit.hidden_size, config.vit.patch_size
    tensors = {name: torch.randn_like(value) for name, value in model.vit_model.state_dict().items()}
    convolution = torch.randn(hidden, 3, patch, patch)
    tensors["vision_model.embeddings.patch_embedding.weight"] = convolution
    last = config.num_vit_layers
    tensors[f"vision_model.encoder.layers.{last}.layer_norm1.weight"] = torch.ones(hidden)
    tensors["vision_model.head.probe"] = torch.ones(1, 1, hidden)
    tensors["text_model.final_layer_norm.weight"] = torch.ones(hidden)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_vit_part(model, tmp_path) == []

    image = torch.randn(3, 2 * patch, 3 * patch)
    expected = torch.nn.functional.conv2d(image[None], convolution, stride=patch).flatten(2)[0].T
    patches = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 3, 4, 0).reshape(6, -1)
    found = patches @ model.state_dict()["vit_model.vision_model.embeddings.patch_embedding.weight"].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        patch_convolution_to_linear(convolution),
        model.state_dict()["vit_model.vision_model.embeddings.patch_embedding.weight"],
    )


def test_missing_part_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="llm_path"):
        load_llm_part(Bagel(tiny_config()), tmp_path)


def test_part_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = qwen2_tensors(tiny_config())
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight as \(7,\)"):
        load_llm_part(Bagel(tiny_config()), tmp_path)
