"""What an export starts from: of the published size, larger than memory, by any of its names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from echo4o.checkpoint.hf.command import ExportRequest, run_export, show_plan
from echo4o.checkpoint.hf.provenance import read_provenance
from echo4o.checkpoint.hf.sources import newest_checkpoint
from echo4o.checkpoint.shared_file import plan_file
from echo4o.checkpoint.slices import WeightsReader
from echo4o.model.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from tests.train.tiny_run import write_bagel, write_tokenizer


def write_sparse(path: Path, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room."""
    layout = plan_file({name: (dtype, tuple(shape)) for name, shape in shapes.items()})
    path.write_bytes(layout.header)
    os.truncate(path, layout.num_bytes)


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 7B model's folder by its manifest, as headers over empty space."""
    manifest = shared / "manifest" / "bagel_7b_mot.json"
    if not manifest.is_file():
        pytest.skip(f"{manifest} is absent")
    shapes, folder = json.loads(manifest.read_text()), tmp_path_factory.mktemp("published")
    llm = LLMConfig(3584, 18944, 28, 28, 4, 152064, 1e-6, 1e6, "Qwen2MoTDecoderLayer", True, False)
    vit = ViTConfig(1152, 4304, 27, 16, 980, 14)
    BagelConfig(llm, vit, VAEConfig(), max_latent_size=64).save_pretrained(folder)
    write_sparse(folder / "ema.safetensors", torch.bfloat16, shapes["model"])
    write_sparse(folder / "ae.safetensors", torch.float32, shapes["vae"])
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("layout", "num_files"), [("both", 2), ("bagel", 2), ("hf", 7)])
def test_the_published_model_has_1223_and_244_tensors(published: Path, tmp_path, layout: str, num_files: int) -> None:
    said: list[str] = []
    show_plan(ExportRequest(published, tmp_path / "out", layout), say=said.append)
    text = "\n".join(said)
    assert "1,223 tensors, and 244 of the VAE" in text and "1,223  from" in text
    assert (
        len([line for line in text.splitlines() if line.endswith(".safetensors") and " from " not in line]) == num_files
    )
    assert not (tmp_path / "out").exists()


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """Four terabytes: torch could not even map them."""
    path = tmp_path / "ema.safetensors"
    try:
        write_sparse(path, torch.float32, {"a": (1 << 40,)})
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor(3.5).numpy().tobytes())
    assert WeightsReader(path).run("a", 2**40 - 2, 2**40).tolist() == [0.0, 3.5]


def test_a_link_is_called_by_what_it_names(tmp_path: Path) -> None:
    """A published card that says ``latest`` says nothing."""
    bagel = write_bagel(tmp_path / "0000002")
    (tmp_path / "latest").symlink_to("0000002")
    said: list[str] = []
    run_export(ExportRequest(tmp_path / "latest", tmp_path / "out", forward=False), say=said.append)
    provenance = read_provenance(tmp_path / "out")
    assert provenance is not None and provenance.source.endswith("/0000002")
    assert any("no forward pass (not asked for)" in line for line in said)
    assert said[0] == f"exporting {bagel}" and set(provenance.origins) == {"0000002/model.safetensors"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").symlink_to(bagel)
    assert newest_checkpoint(tmp_path / "elsewhere" / "mine").name == "mine"
