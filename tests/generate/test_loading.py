"""Models in fewer bits, and with layers elsewhere: what they compute, where they lie, and what they take."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from echo4o.checkpoint.adapters import AdapterConfig, load_bagel, write_adapter_config
from echo4o.checkpoint.weights import write_weights
from echo4o.generate import loading, offloading
from echo4o.generate.context import Addition, Context, Markers, Reader, Text
from echo4o.generate.layers import layers_of, num_bytes
from echo4o.generate.loading import LoadingError
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model import Bagel, BagelConfig
from tests.train.tiny_run import tiny_config, write_bagel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Echo4oPipeline:
    return Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu")


def with_model(plain: Echo4oPipeline, model: Bagel) -> Echo4oPipeline:
    return Echo4oPipeline(
        model, plain.vae, plain.tokenizer, vars(plain.markers), plain.vae_transform, plain.vit_transform
    )


def run(pipe: Echo4oPipeline) -> tuple[Tensor, str, list[str]]:
    """Latents of an image from two references, its thought, and an answer: every part of the model takes part."""
    references = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    drawn = pipe("both", references, think=True, max_think_tokens=5, num_timesteps=3, height=32, width=48)
    return drawn.info[0]["latents"], drawn.texts[0], [pipe.understand("what?", references[:1], max_think_tokens=6)]


def places(model: Bagel) -> list[str]:
    """Of every layer: computed on the device, or offloaded (its parameters have no values between calls)."""
    return ["away" if next(layer.parameters()).is_meta else "device" for layer in layers_of(model).values()]


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and one[1:] == other[1:]


# ---------------------------------------------------------------- fewer bits


@pytest.mark.parametrize(("kind", "error", "ratio"), [("int8", 0.02, 0.3), ("nf4", 0.25, 0.2)])
def test_quantised_weights_are_small_and_used(plain, folder, kind, error, ratio):
    model = load_bagel(folder)
    layers = layers_of(model).values()
    before = sum(map(num_bytes, layers))
    loading.quantize(model, kind)
    # Norms, biases and, here, the small blocks' scales are not in few bits: the bound is that of a tiny model.
    assert sum(map(num_bytes, layers)) < ratio * before + sum(norm_and_bias_bytes(layer) for layer in layers)
    expected, actual = run(plain)[0], run(with_model(plain, model))[0]
    relative = ((actual - expected).norm() / expected.norm()).item()
    assert 0 < relative < error


def norm_and_bias_bytes(layer: nn.Module) -> int:
    return sum(parameter.nbytes for name, parameter in layer.named_parameters() if parameter.ndim == 1)


def test_only_linear_weights_of_layers_are_quantised(folder):
    model = load_bagel(folder)
    loading.quantize(model, "int8")
    found = {name for name, parameter in model.named_parameters() if hasattr(parameter, "__tensor_flatten__")}
    names = {name for name, parameter in model.named_parameters() if parameter.ndim == 2 and ".layers." in name}
    assert found == names
    assert {"self_attn.q_proj_moe_gen", "mlp_moe_gen.down_proj", "self_attn.q_proj", "mlp.fc1"} <= {
        name.split(".layers.0.")[-1].removesuffix(".weight") for name in found
    }


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_model_computes_with_the_quantised_weights(plain, folder, kind):
    """A model whose float weights are the rounded ones gives the same: no layer reads its weights past its module."""
    model, rounded = load_bagel(folder), load_bagel(folder)
    loading.quantize(model, kind)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if hasattr(weights[name], "__tensor_flatten__"):
                identity = torch.eye(parameter.shape[1])
                parameter.copy_(nn.functional.linear(identity, weights[name]).T)
    expected, actual = run(with_model(plain, rounded))[0], run(with_model(plain, model))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_blocks_do_not_divide(plain, tmp_path):
    config = tiny_config()
    assert config.vit is not None
    config = replace(config, vit=replace(config.vit, intermediate_size=43))
    folder = write_bagel(tmp_path, config)
    model = loading.load(folder, "float32", "cpu", quantize="nf4")
    assert run(with_model(plain, model))[0].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_loading_quantised_equals_quantising_loaded(plain, folder, kind):
    model = load_bagel(folder)
    loading.quantize(model, kind)
    assert same(
        run(with_model(plain, model)), run(with_model(plain, loading.load(folder, "float32", "cpu", quantize=kind)))
    )


# ---------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("streamed", [False, True])
def test_offloaded_model_gives_the_same(plain, folder, tmp_path, where, streamed):
    if streamed:
        model = loading.load(folder, "float32", "cpu", offload=where, offload_folder=tmp_path / "offload")
    else:
        model = load_bagel(folder)
        loading.offload(model, where, "cpu", folder=tmp_path / "offload")
    assert set(places(model)) == {"away"}
    assert model.device == torch.device("cpu")
    assert same(run(with_model(plain, model)), run(plain))
    assert set(places(model)) == {"away"}, "weights stay on the device after use"
    # A folder's own weights file serves as it is.
    assert (tmp_path / "offload").exists() == (where == "disk" and not streamed)


def test_bfloat16_weights_of_a_float32_file(plain, folder):
    expected = run(with_model(plain, load_bagel(folder, dtype="bfloat16")))
    assert same(run(with_model(plain, loading.load(folder, "bfloat16", "cpu", offload="disk"))), expected)


def test_sharded_file_serves_the_disk(plain, folder, tmp_path):
    model = load_bagel(folder)
    model.config.save_pretrained(tmp_path)
    write_weights(model.state_dict(), tmp_path, "model", max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*"))) > 2
    assert same(run(with_model(plain, loading.load(tmp_path, "float32", "cpu", offload="disk"))), run(plain))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_adapters_are_merged_into_layers_elsewhere(plain, folder, tmp_path, where):
    layer = "language_model.model.layers.1.mlp_moe_gen.up_proj"
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(48, 2, generator=generator)
    prefix = "base_model.model."
    tensors = {f"{prefix}{layer}.lora_A.weight": a, f"{prefix}{layer}.lora_B.weight": b}
    write_weights(tensors, tmp_path / "lora", "adapter_model")
    write_adapter_config(tmp_path / "lora", AdapterConfig(str(folder), 2, 2.0, 0.0, ("up_proj",)))
    expected = run(with_model(plain, load_bagel(tmp_path / "lora")))
    assert not same(expected, run(plain))
    actual = loading.load(tmp_path / "lora", "float32", "cpu", offload=where, offload_folder=tmp_path / "offload")
    assert same(run(with_model(plain, actual)), expected)


def test_auto_fills_the_device_first(plain, folder):
    model = load_bagel(folder)
    layers = layers_of(model)
    sizes = {name: num_bytes(layer) for name, layer in layers.items()}
    largest = max(sizes.values())
    rest = num_bytes(model) - sum(sizes.values())
    budget = rest + largest + sizes["language_model.model.layers.0"]  # one layer, and room for one in transit
    model = loading.load(folder, "float32", "cpu", offload="auto", max_memory={"cpu": budget})
    assert places(model)[:2] == ["device", "away"]
    assert same(run(with_model(plain, model)), run(plain))
    assert set(places(loading.load(folder, "float32", "cpu", offload="auto"))) == {"device"}


def test_auto_on_a_gpu_takes_main_memory_before_the_disk():
    budget = {0: 100, "cpu": 50}
    room = offloading.Room("auto", torch.device("cuda", 0), budget, reserved=10)
    room.keep_for_transit([nn.Linear(5, 1, bias=False)] * 10)  # 20 bytes each
    assert [room.place(20) for _ in range(7)] == ["device"] * 3 + ["cpu"] * 2 + ["disk"] * 2


@pytest.mark.parametrize(("text", "number"), [("20GiB", 20 << 30), ("1.5 MB", 1_500_000), (7, 7), ("12", 12)])
def test_sizes_in_words(text, number):
    assert offloading._bytes(text) == number


def test_int8_layers_wait_in_main_memory(plain, folder):
    expected = loading.load(folder, "float32", "cpu", quantize="int8")
    model = loading.load(folder, "float32", "cpu", quantize="int8", offload="cpu")
    assert set(places(model)) == {"away"}
    assert same(run(with_model(plain, model)), run(with_model(plain, expected)))


def test_temporary_folder_goes_with_the_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = load_bagel(folder)
    loading.offload(model, "disk", "cpu")
    assert len(list(tmp_path.iterdir())) == 1
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"quantize": "int3"}, "int8, nf4"),
        ({"offload": "tape"}, "cpu, disk, auto"),
        ({"quantize": "int8", "offload": "disk"}, "offload cpu with quantize"),
        ({"quantize": "nf4", "offload": "cpu"}, "nf4 without offload"),
        ({"offload": "auto", "max_memory": {1: "1GiB"}}, "name cpu"),
        ({"offload": "auto", "max_memory": {"cpu": "lots"}}, "20GiB"),
    ],
)
def test_refusals_have_a_remedy(folder, settings, remedy):
    with pytest.raises(LoadingError, match=remedy):
        loading.load(folder, "float32", "cpu", **settings)


@pytest.mark.parametrize(
    ("settings", "package"), [({"quantize": "nf4"}, "torchao"), ({"offload": "cpu"}, "accelerate")]
)
def test_missing_library(folder, monkeypatch, settings, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadingError, match=rf"needs {package}: pip install 'echo4o\["):
        loading.load(folder, "float32", "cpu", **settings)


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ema.safetensors or model.safetensors"):
        loading.load(tmp_path, "float32", "cpu", offload="disk")


# ---------------------------------------------------------------- memory, in a process of its own

MEASURE = """
import json, sys, torch
import accelerate.hooks, accelerate.utils
from echo4o.generate import loading
from echo4o.generate.context import Addition, Context, Markers, Reader, Text
from echo4o.generate.layers import layers_of, num_bytes
from echo4o.generate.quantization import quantize_layer

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def peak(action):
    start = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    result = action()
    return result, status("VmHWM") - start

folder, keywords = sys.argv[1], json.loads(sys.argv[2])
if "quantize" in keywords:  # libraries load their own parts at the first use
    quantize_layer(torch.nn.Linear(64, 64, dtype=torch.bfloat16), keywords["quantize"])
model, loaded = peak(lambda: loading.load(folder, "bfloat16", "cpu", **keywords))
reader = Reader(model.eval(), Markers(0, 1, 2, 3))
(_, hidden), ran = peak(lambda: reader.extend([Addition(Context(), Text((5, 6, 7)))]))
layers = sum(num_bytes(layer) for layer in layers_of(model).values())
print(json.dumps({"loaded": loaded, "ran": ran, "layers": layers, "hidden": hidden[0].float().tolist()}))
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.2 GB in bfloat16, nearly all of it in its ten layers."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config()
    llm = replace(
        config.llm, hidden_size=512, intermediate_size=2560, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    config = replace(config, llm=llm)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Bagel(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    write_weights(tensors, folder)
    return folder


def measured(folder: Path, **keywords: str) -> dict:
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(keywords)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MARGIN = 30e6  # the rest of the model, and what the allocator keeps


def sizes_of_layers(folder: Path) -> list[int]:
    with torch.device("meta"):
        model = Bagel(BagelConfig.from_pretrained(folder)).bfloat16()
    return [num_bytes(layer) for layer in layers_of(model).values()]


@reads_proc
def test_memory_with_layers_on_the_disk(large_folder):
    sizes = sizes_of_layers(large_folder)
    measures = measured(large_folder, offload="disk")
    assert measures["loaded"] < MARGIN < sum(sizes) / 5
    assert measures["ran"] < max(sizes) + MARGIN < sum(sizes) / 3
    reader = Reader(load_bagel(large_folder, "bfloat16"), Markers(0, 1, 2, 3))
    _, hidden = reader.extend([Addition(Context(), Text((5, 6, 7)))])
    assert hidden[0].float().tolist() == measures["hidden"]


@reads_proc
@pytest.mark.parametrize(
    ("kind", "share", "intermediate"),
    # Of one weight; nf4 compares 2²⁰ weights at once with 16 values.
    [("int8", 0.55, 10e6), pytest.param("nf4", 0.3, 60e6, marks=pytest.mark.slow)],
)
def test_memory_while_quantising(large_folder, kind, share, intermediate):
    sizes = sizes_of_layers(large_folder)
    measures = measured(large_folder, quantize=kind)
    assert measures["layers"] < share * sum(sizes)
    assert measures["loaded"] < measures["layers"] + max(sizes) + intermediate + MARGIN < sum(sizes)
