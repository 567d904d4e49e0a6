"""What an export starts from: of the published size, larger than memory, by any of its names."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.command import ExportRequest, run_export, show_plan
from echo4o.checkpoint.hf.new_folder import new_folder
from echo4o.checkpoint.hf.provenance import read_provenance
from echo4o.checkpoint.hf.sources import Source, newest_checkpoint
from echo4o.checkpoint.hf.verify import exit_status, report_text, verify
from echo4o.checkpoint.shared_file import plan_file
from echo4o.checkpoint.slices import WeightsReader
from echo4o.model.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from tests.checkpoint.hf.folders import change_json, change_tensors
from tests.train.tiny_run import tiny_config, write_bagel, write_tokenizer


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


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel") / "tiny")


@pytest.fixture
def bagel(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def test_a_folder_with_text_config_and_vision_config(bagel: Path) -> None:
    """One ``config.json`` with the names that transformers' models have, tensors behind ``model.``."""
    parts = {}
    for name, own in (("text_config", "llm_config.json"), ("vision_config", "vit_config.json")):
        parts[name] = json.loads((bagel / own).read_text())
        (bagel / own).unlink()
    change_json(bagel / "config.json", **parts)
    change_tensors(bagel / "model.safetensors", lambda t: [t.update({f"model.{n}": t.pop(n)}) for n in list(t)])
    source = Source(bagel)
    assert source.config.llm == tiny_config().llm and source.config.vit == tiny_config().vit
    findings = verify(bagel, forward=False)
    assert exit_status(findings) == 0, report_text(findings, bagel)


def test_an_autoencoder_that_no_config_describes(bagel: Path, tmp_path: Path) -> None:
    """Nothing stated stands for FLUX's; the tensors know better."""
    change_json(bagel / "config.json", vae_config=None)
    run_export(ExportRequest(bagel, tmp_path / "out", forward=False), say=lambda text: None)
    config = BagelConfig.from_pretrained(tmp_path / "out")
    assert config.vae is not None and config.vae.ch == 32


def test_a_table_without_rows_and_a_folder_in_place_of_a_file(bagel: Path) -> None:
    change_tensors(bagel / "model.safetensors", lambda t: t.update({"latent_pos_embed.pos_embed": torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match=r"holds latent_pos_embed.pos_embed as \(\), the configs say"):
        Source(bagel)
    (bagel / "model.safetensors").unlink()
    (bagel / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read .*; download or copy it again"):
        Source(bagel)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_a_batch_system_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as ended, new_folder(tmp_path / "out") as partial:
        (partial / "half").touch()
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and not list(tmp_path.iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL
