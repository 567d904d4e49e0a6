"""What an export refuses, what it leaves behind when something fails, and what it writes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf import new_folder as folders
from echo4o.checkpoint.hf.command import ExportRequest, run_export
from echo4o.checkpoint.hf.layouts import parse_size
from echo4o.checkpoint.hf.provenance import read_provenance
from echo4o.checkpoint.hf.sources import Source
from echo4o.checkpoint.hf.verify import verify
from echo4o.checkpoint.weights import write_weights
from echo4o.cli import app
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model import Bagel
from echo4o.model.embeddings import sincos_2d
from tests.train.tiny_run import tiny_config, write_bagel

ROOT = Path(__file__).resolve().parents[3]
TABLE = "latent_pos_embed.pos_embed"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel") / "tiny")


@pytest.fixture
def bagel(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def export(folder: Path, out: Path, **options: object) -> list[str]:
    said: list[str] = []
    run_export(ExportRequest(folder, out, **options), say=said.append)  # type: ignore[arg-type]
    return said


def refused(folder: Path, tmp_path: Path, match: str, **options: object) -> None:
    """An error that says `match`, and nothing left behind."""
    out = tmp_path / "place" / "out"
    with pytest.raises((CheckpointError, FileNotFoundError), match=match):
        export(folder, out, **options)
    assert not out.exists() and (not out.parent.is_dir() or not list(out.parent.iterdir()))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: t for name, t in tensors.items() if changes.get(name, t) is not None}, path)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- refused


def test_truncated_file(bagel: Path, tmp_path: Path) -> None:
    path = bagel / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(bagel, tmp_path, "model.safetensors is not a complete safetensors file .*download or copy it again")


def test_missing_shard(bagel: Path, tmp_path: Path) -> None:
    tensors = load_file(bagel / "model.safetensors")
    (bagel / "model.safetensors").unlink()
    files = write_weights(tensors, bagel, "model", max_shard_bytes=40_000)
    files[1].unlink()
    refused(bagel, tmp_path, f"shards that are not there: {files[1].name}")


def test_wrong_dtype(bagel: Path, tmp_path: Path) -> None:
    change_weights(bagel, **{HEAD: torch.zeros(260, 32, dtype=torch.int8)})
    refused(bagel, tmp_path, "lm_head.weight as torch.int8: quantised weights cannot be exported")


def test_extra_key(bagel: Path, tmp_path: Path) -> None:
    change_weights(bagel, **{"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(48, 32)})
    refused(bagel, tmp_path, "holds 1 tensors that its configs have no place for, e.g. language_model.model.layers.7")


def test_missing_tensor(bagel: Path, tmp_path: Path) -> None:
    change_weights(bagel, **{HEAD: None})
    refused(bagel, tmp_path, r"lacks 1 of the \d+ tensors .*, e.g. language_model.lm_head.weight. Pass .*--base")


def test_wrong_shape(bagel: Path, tmp_path: Path) -> None:
    change_weights(bagel, **{HEAD: torch.zeros(99, 32)})
    refused(bagel, tmp_path, r"lm_head.weight as \(99, 32\), the configs say \(260, 32\)")


def test_not_finite(bagel: Path, tmp_path: Path) -> None:
    weight = load_file(bagel / "model.safetensors")[HEAD]
    weight[3, 4:6] = float("nan")
    change_weights(bagel, **{HEAD: weight})
    refused(bagel, tmp_path, "language_model.lm_head.weight has 2 NaN: export an earlier checkpoint")


def test_too_large_for_float16(bagel: Path, tmp_path: Path) -> None:
    weight = load_file(bagel / "model.safetensors")[HEAD]
    weight[3, 4] = 1e6
    change_weights(bagel, **{HEAD: weight})
    refused(bagel, tmp_path, "has 1 infinite numbers: export with --dtype bfloat16", dtype="float16")
    export(bagel, tmp_path / "out", dtype="bfloat16")


def test_no_vae_no_tokenizer_no_configs(bagel: Path, tmp_path: Path) -> None:
    for name, match in (
        ("ae.safetensors", "has no VAE"),
        ("tokenizer.json", "has no tokenizer"),
        ("llm_config.json", "neither llm_config.json nor"),
    ):
        content = (bagel / name).read_bytes()
        (bagel / name).unlink()
        refused(bagel, tmp_path, match)
        (bagel / name).write_bytes(content)
    (bagel / "config.json").unlink()
    (bagel / "llm_config.json").unlink()
    refused(bagel, tmp_path, "has no configs .* as upstream's training checkpoints: pass the BAGEL folder .* as --base")


def test_other_programs_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / "__0_0.distcp").touch()
    refused(folder, tmp_path, "has no ema.safetensors .*, but __0_0.distcp: that is another program's format")
    refused(tmp_path / "nowhere", tmp_path, "is not a folder")


def test_a_model_one_folder_below(bagel: Path, tmp_path: Path) -> None:
    refused(bagel.parent, tmp_path, "has no ema.safetensors .*, but its folder tiny has: pass ")


def test_an_incomplete_training_checkpoint(bagel: Path, tmp_path: Path) -> None:
    (bagel / "training.json").write_text("{}")
    refused(bagel, tmp_path, "is not a complete checkpoint: .* has no complete marker")


@pytest.mark.parametrize("size", ["", "5", "0GB", "5 TB", "GB", "-1GB"])
def test_sizes_that_are_none(size: str) -> None:
    if size == "5":
        assert parse_size(size) == 5
        return
    with pytest.raises(CheckpointError, match="is no size; write for example 5GB"):
        parse_size(size)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500mb", "1.5 GiB", "7K")] == [5 * 10**9, 5 * 10**8, 3 << 29, 7000]


# ---------------------------------------------------------------- targets


def test_the_target_exists(bagel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already; choose another --out, or remove it"):
        export(bagel, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export(bagel, out)  # an empty folder is as good as none
    assert (out / "ema.safetensors").is_file()


def test_a_target_that_cannot_be_written(bagel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="cannot write .*out: a part of the path is a file. Choose another --out"):
        export(bagel, tmp_path / "file" / "out")
    if os.geteuid() == 0:
        return  # root may write anywhere
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="cannot write .*Permission denied"):
        export(bagel, place / "out")


def test_a_disk_without_room_is_refused_before_anything_is_written(bagel: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused(bagel, tmp_path, "0.04 GB are needed, 0.00 GB are free on its disk. Make room there")


def test_a_disk_that_fills_up_while_writing(bagel: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        refused(bagel, tmp_path, "cannot write .*File too large. Make room there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def test_a_full_tmpfs(bagel: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(CheckpointError, match="are needed, 0.00 GB are free"):
            export(bagel, small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_killed_at_any_time_and_started_again(bagel: Path, tmp_path: Path) -> None:
    """Whenever the process is killed, the folder is complete or absent, and the next export succeeds."""
    out = tmp_path / "place" / "out"
    code = (
        "import sys, pathlib; from echo4o.checkpoint.hf import writing; import time\n"
        "slow = writing.SharedFile.write\n"
        "def write(*words):\n    time.sleep(0.02); slow(*words)\n"
        "writing.SharedFile.write = write\n"
        "from echo4o.checkpoint.hf.command import ExportRequest, run_export\n"
        "print('ready', flush=True)\n"
        "run_export(ExportRequest(sys.argv[1], sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(bagel), str(out)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("place/.out.partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="another process is writing"):
        export(bagel, out)
    process.kill()
    process.wait(30)
    assert not out.exists() and list(out.parent.iterdir())  # what is left does not bear the name
    export(bagel, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not [finding for finding in verify(out) if finding.level == "error"]


def test_interrupted(bagel: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("echo4o.checkpoint.hf.export.write_configs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(bagel, tmp_path / "place" / "out")
    assert not list((tmp_path / "place").iterdir())


# ---------------------------------------------------------------- written


def test_verification_would_see_a_wrong_byte(bagel: Path, tmp_path: Path, monkeypatch) -> None:
    """One flipped bit between hashing and the disk."""
    from echo4o.checkpoint.hf import export as module

    def broken(path: Path, *words: object) -> str:
        digest = module_write(path, *words)
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        return digest

    module_write = module.write_tensors
    monkeypatch.setattr(module, "write_tensors", broken)
    refused(bagel, tmp_path, "what was written is not sound, and has been removed: ema.safetensors")


@pytest.mark.parametrize("layout", ["both", "bagel", "hf"])
def test_files_of_a_layout(bagel: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    said = export(bagel, out, layout=layout, max_shard_size="40KB")
    common = {
        "README.md", "ae.safetensors", "config.json", "echo4o_export.json", "generation_config.json", "llm_config.json",
        "merges.txt", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vit_config.json",
        "vocab.json",
    }  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert common <= names and names - common <= names
    weights = {name for name in names if name.endswith(".safetensors")} - {"ae.safetensors"}
    assert weights == {"ema.safetensors"} if layout != "hf" else len(weights) > 2
    assert ("model.safetensors.index.json" in names) == (layout != "bagel")
    assert any(name.endswith(".py") for name in names) == (layout != "bagel")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "bagel" and config["max_latent_size"] == 8
    assert config["llm_config"]["hidden_size"] == 32 and config["vit_config"]["patch_size"] == 14
    if layout == "both":
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index.values()) == {"ema.safetensors", "ae.safetensors"}  # as published
        vae = load_file(out / "ae.safetensors")
        assert {name for name, file in index.items() if file == "ae.safetensors"} == set(vae)
    assert not [finding for finding in verify(out) if finding.level != "note"]
    assert any("a forward pass equals the checkpoint's" in line for line in said)


def test_what_it_says_of_itself(bagel: Path, tmp_path: Path) -> None:
    export(bagel, tmp_path / "out")
    provenance = read_provenance(tmp_path / "out")
    assert provenance is not None and provenance.origins == {
        "tiny/model.safetensors": len(Bagel(tiny_config()).state_dict())
    }
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")
    )


def test_a_larger_table_goes_on_where_the_old_one_ends(bagel: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    export(bagel, tmp_path / "out", max_latent_size=12, dtype="float32")
    assert "grows from 8 × 8 to 12 × 12" in caplog.text and "192 pixels a side instead of 128" in caplog.text
    table = load_file(tmp_path / "out" / "ema.safetensors")[TABLE]
    assert torch.equal(table, sincos_2d(32, 12).float())
    old = load_file(bagel / "model.safetensors")[TABLE].reshape(8, 8, 32)
    assert torch.equal(table.reshape(12, 12, 32)[:8, :8], old)
    pipes = [Echo4oPipeline.from_pretrained(f, dtype="float32", device="cpu") for f in (bagel, tmp_path / "out")]
    first, second = (pipe("a", height=64, width=64, num_timesteps=3, seed=1).images[0] for pipe in pipes)
    assert first.tobytes() == second.tobytes()
    assert pipes[1]("a", height=192, width=192, num_timesteps=2).images[0].size == (192, 192)
    refused(bagel, tmp_path, "a table can only grow", max_latent_size=4)


def test_a_trained_table_cannot_be_extended(bagel: Path, tmp_path: Path) -> None:
    change_weights(bagel, **{TABLE: torch.randn(64, 32)})
    refused(bagel, tmp_path, "is not the sin-cos table, so nobody knows how it goes on", max_latent_size=12)


def test_a_stale_max_latent_size_is_corrected(bagel: Path, tmp_path: Path) -> None:
    change_json(bagel / "config.json", max_latent_size=32)
    export(bagel, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_latent_size"] == 8


def test_the_config_json_that_was_published_with_a_comma_too_many(bagel: Path, tmp_path: Path) -> None:
    vae = tiny_config().vae
    assert vae is not None
    text = json.dumps({"vae_config": {"ch": vae.ch, "ch_mult": vae.ch_mult, "num_res_blocks": vae.num_res_blocks}})
    (bagel / "config.json").write_text(text[:-1] + ', "name": ["BAGEL-7B-MoT"],}')
    export(bagel, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bagel"


def test_the_newest_checkpoint_of_a_run(bagel: Path, tmp_path: Path) -> None:
    from echo4o.checkpoint.folders import publish

    for step in (3, 12):
        partial = Path(shutil.copytree(bagel, tmp_path / "run" / "checkpoints" / f"{step:07d}.partial"))
        publish(partial, partial.with_suffix(""), step)
    said = export(tmp_path / "run", tmp_path / "out")
    assert said[0].endswith("checkpoints/0000012") and "step 12" in said[-1]


def test_what_is_missing_comes_from_the_base(bagel: Path, tmp_path: Path) -> None:
    """Upstream's own training checkpoint: no configs, no tokenizer, no VAE, and parts it did not train."""
    folder = tmp_path / "0000500"
    folder.mkdir()
    tensors = load_file(bagel / "model.safetensors")
    trained = {name: t + 1 for name, t in tensors.items() if not name.startswith(("vit_", "connector", "latent_pos"))}
    save_file(trained, folder / "ema.safetensors")
    said = export(folder, tmp_path / "out", base=bagel, dtype="float32")
    found = load_file(tmp_path / "out" / "ema.safetensors")
    assert all(torch.equal(found[name], trained.get(name, tensor)) for name, tensor in tensors.items())
    assert any("from 0000500/ema.safetensors" in line for line in said)
    assert any(f"{len(tensors) - len(trained):,} tensors from tiny/model.safetensors" in line for line in said)


def test_sources_are_read_in_pieces(bagel: Path, monkeypatch) -> None:
    monkeypatch.setattr("echo4o.checkpoint.hf.sources.CHUNK_ELEMENTS", 7)
    source = Source(bagel)
    chunks = list(source.chunks(HEAD, torch.float32))
    assert len(chunks) == -(-260 * 32 // 7)
    assert torch.equal(torch.cat(chunks).reshape(260, 32), load_file(bagel / "model.safetensors")[HEAD])


def test_the_command_line(bagel: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    dry = runner.invoke(app, ["export", str(bagel), "--out", str(tmp_path / "out"), "--dry-run"])
    assert dry.exit_code == 0 and "ema.safetensors" in dry.output and not (tmp_path / "out").exists()
    done = runner.invoke(app, ["export", str(bagel), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    again = runner.invoke(app, ["export", str(bagel), "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists already" in again.output and "Traceback" not in again.output
    assert runner.invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    same = runner.invoke(app, ["diff", str(bagel), str(tmp_path / "out")])
    assert same.exit_code == 0 and "bfloat16" in same.output
