"""The code in an hf folder: complete, free of this project, and transformers' model computes what ours does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from echo4o.checkpoint.adapters import AdapterConfig, merge_adapter, write_adapter_config
from echo4o.checkpoint.hf.remote_code import ARCHITECTURE, AUTO_MAP, remote_files, with_relative_imports
from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter, public_name
from echo4o.checkpoint.weights import write_weights
from echo4o.model import Bagel, BagelConfig
from echo4o.model.vae import AutoEncoder
from echo4o.packed import PackedBatch
from echo4o.train.lora import add_lora
from echo4o.train.selection import trainable_parameters
from tests.train.tiny_run import tiny_config, write_tokenizer

ROOT = Path(__file__).resolve().parents[3]
HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TEXT = "<|im_start|>naïve 你好 12<|im_end|>"


# ---------------------------------------------------------------- the files


def test_files_are_complete_and_free_of_this_project() -> None:
    files = remote_files()
    for name, text in files.items():
        tree = ast.parse(text)
        heading, origin, *_ = text.splitlines()
        assert "Apache-2.0" in heading and origin.startswith("# Generated from echo4o ")
        assert ast.get_docstring(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.split(".")[0] == "echo4o"], name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "echo4o", name
                assert not node.level or f"{node.module}.py" in files, f"{name} imports {node.module}"
    classes = {
        f"{name.removesuffix('.py')}.{node.name}"
        for name, text in files.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    assert set(AUTO_MAP.values()) <= classes
    assert files == remote_files()


@pytest.mark.parametrize(
    "line",
    [
        "import echo4o",
        "import echo4o.model.mot",
        "from echo4o.model import mot",
        "from echo4o.data import images",
        "from . import mot",
        "from .mot import Step",
        "def late():\n    from echo4o.data.images import ImageTransform",
    ],
)
def test_imports_that_cannot_travel_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="cannot be exported"):
        with_relative_imports(f'"""Room."""\n{line}\n', "echo4o.model.room")


def test_imports_become_relative_and_nothing_else_changes() -> None:
    source = (
        '"""from echo4o.model.mot import x"""\nfrom echo4o.model.mot import (\n    Order,\n    Step,\n)\nimport torch\n'
    )
    assert with_relative_imports(source, "room") == source.replace("\nfrom echo4o.model.mot", "\nfrom .bagel_mot")


# ---------------------------------------------------------------- loaded in another process


@dataclass
class Folder:
    """A case: what is in its folder."""

    config: BagelConfig
    left_out: tuple[str, ...] = ()
    sharded: bool = False
    #: The published layout: an index that names ema.safetensors and the autoencoder's file.
    single: bool = False
    out: dict[str, Any] = field(default_factory=dict)


def llm(config: BagelConfig, **changes: Any) -> BagelConfig:
    return replace(config, llm=replace(config.llm, **changes))


def folders() -> dict[str, Folder]:
    config = tiny_config()
    tied = llm(config, tie_word_embeddings=True)
    vit = config.vit
    assert vit is not None
    return {
        "whole": Folder(config),
        "tied, both names": Folder(tied),
        "tied, one name": Folder(tied, left_out=(HEAD,)),
        "tied, the other name": Folder(tied, left_out=(EMBEDDING,), sharded=True),
        "sharded": Folder(config, sharded=True),
        "published index": Folder(config, single=True),
        "no tables": Folder(config, left_out=("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")),
        "no vit": Folder(replace(config, vit=None, visual_und=False)),
        "no generation": Folder(replace(config, vae=None, visual_gen=False)),
        "vit rope": Folder(replace(config, vit_rope=True)),
        "moe": Folder(llm(config, layer_module="Qwen2MoEDecoderLayer")),
        "dense": Folder(llm(config, layer_module="Qwen2DecoderLayer", qk_norm=False)),
    }


def fields_for(config: BagelConfig) -> dict[str, Any]:
    """Five words, an image of four patches to look at and one of four latent tokens to draw, as far as there are."""
    fields: dict[str, Any] = {
        "sequence_length": 5,
        "sample_lens": [5],
        "split_lens": [5],
        "attn_modes": ["causal"],
        "packed_text_ids": torch.tensor([5, 9, 77, 130, 4]),
        "packed_text_indexes": torch.arange(5),
        "packed_position_ids": torch.arange(5),
        "packed_label_ids": torch.tensor([9, 77, 130]),
        "ce_loss_indexes": torch.tensor([0, 1, 2]),
        "ce_loss_weights": torch.ones(3),
    }

    def add_image(mode: str, position: int) -> Tensor:
        at = fields["sequence_length"] + torch.arange(4)
        fields["sequence_length"] += 4
        fields["sample_lens"] = [fields["sequence_length"]]
        fields["split_lens"].append(4)
        fields["attn_modes"].append(mode)
        fields["packed_position_ids"] = torch.cat([fields["packed_position_ids"], torch.full((4,), position)])
        return at

    if config.visual_und:
        fields["packed_vit_token_indexes"] = add_image("full", 5)
        fields["packed_vit_tokens"] = torch.linspace(-1, 1, 4 * 588).reshape(4, 588)
        fields["packed_vit_position_ids"] = torch.tensor([0, 1, 4, 5])
        fields["vit_token_seqlens"] = [4]
    if config.visual_gen:
        at = add_image("noise", 6)
        fields |= {"packed_vae_token_indexes": at, "mse_loss_indexes": at}
        fields["packed_latent_position_ids"] = torch.tensor([0, 1, 8, 9])
        fields["packed_timesteps"] = torch.full((4,), 0.3)
        fields["patchified_vae_latent_shapes"] = [(2, 2)]
    return fields


@torch.no_grad()
def outputs(model: Bagel, case: dict[str, Any]) -> dict[str, Tensor]:
    out = model(PackedBatch(**case["fields"]), case["latents"], case["noise"])
    named = {"mse": out.mse, "ce": out.ce, "last_hidden_state": out.last_hidden_state}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def write_folder(path: Path, folder: Folder) -> tuple[Bagel, dict[str, Any]]:
    """A folder as `echo4o export` lays it out, and what its model gives."""
    torch.manual_seed(0)
    config, model = folder.config, Bagel(folder.config).eval()
    if config.visual_gen:
        torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    state = model.state_dict()
    config.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    for part in ("llm_config", "vit_config"):
        values[part] = json.loads(text.read_text()) if (text := path / f"{part}.json").exists() else None
    values |= {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    values["tie_word_embeddings"] = config.llm.tie_word_embeddings
    (path / "config.json").write_text(json.dumps(values))
    for name, text in remote_files().items():
        (path / name).write_text(text)
    written = {name: tensor.clone() for name, tensor in state.items() if name not in folder.left_out}
    vae = AutoEncoder(config.vae) if folder.single and config.vae else None
    if folder.single:
        weight_map = dict.fromkeys(written, "ema.safetensors")
        if vae:
            save_file(vae.state_dict(), path / "ae.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(vae.state_dict(), "ae.safetensors")
        save_file(written, path / "ema.safetensors", {"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        write_weights(written, path, "model", 100_000 if folder.sharded else None)
    generator = torch.Generator().manual_seed(1)
    latents, noise = (
        torch.randn(4, config.latent_dim, generator=generator) if config.visual_gen else None for _ in range(2)
    )
    case = {"folder": str(path), "config": values, "fields": fields_for(config), "latents": latents, "noise": noise}
    return model, case | {"state": {name: tensor.clone() for name, tensor in state.items()}}


def write_adapter(path: Path, model: Bagel, case: dict[str, Any]) -> dict[str, Any]:
    """Adapters of every kind of layer, what a model with them gives, and the weights that our own merging makes."""
    adapted = Bagel(model.config).eval()
    adapted.load_state_dict(case["state"])
    layers = add_lora(adapted, rank=3, alpha=5.0, targets=("gen", "connector", "vae2llm", "llm2vae", "vit"))
    assert {"vae2llm", "llm2vae", "connector.fc1"} <= set(layers)
    named = {public_name(name): p for name, p in trainable_parameters(adapted).items() if is_adapter(public_name(name))}
    with torch.no_grad():
        for parameter in named.values():
            parameter.normal_(std=0.1)
    path.mkdir()
    tensors = {ADAPTER_PREFIX + name: p.detach().clone() for name, p in named.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    write_adapter_config(path, AdapterConfig("hf/BAGEL-7B-MoT", 3, 5.0, 0.0, tuple(layers)))
    out = outputs(adapted, case)
    assert (out["mse"] - case["out"]["mse"]).abs().max() > 1e-3
    merge_adapter(model, path)
    return {"adapter": str(path), "adapted": out, "merged": model.state_dict()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("remote")
    cases = {}
    for number, (name, folder) in enumerate(folders().items()):
        model, cases[name] = write_folder(root / f"case.{number}-x", folder)
        cases[name]["out"] = outputs(model, cases[name])
        if name == "whole":
            whole, path = cases[name], root / f"case.{number}-x"
            write_tokenizer(path)
            vae = AutoEncoder(folder.config.vae).eval()  # type: ignore[arg-type]
            save_file(vae.state_dict(), path / "ae.safetensors")
            z = torch.randn(1, 16, 4, 4)
            with torch.no_grad():
                whole |= {"z": z, "image": vae.decode(z), "text": TEXT, "root": str(ROOT)}
            from tokenizers import Tokenizer

            whole["ids"] = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids
            whole |= write_adapter(root / "adapter", model, whole)
    torch.save(cases, root / "cases.pt")
    script = Path(__file__).with_name("load_remote.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(root / "cases.pt"), str(root / "results.json")],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((root / "results.json").read_text())
    shutil.rmtree(root, ignore_errors=True)
    return found


CHECKS = ("config", "dtype", "round_trip", "gradient", "errors", "beside", "adapters", "pipeline")


@pytest.mark.parametrize("title", [*(f"loading {name}" for name in folders()), *CHECKS])
def test_in_a_process_without_this_project(results: dict[str, str], title: str) -> None:
    assert not results[title], results[title]
