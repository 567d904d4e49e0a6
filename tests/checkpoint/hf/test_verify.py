"""Verification of folders: every fault gives one error with its fix, good folders of every layout give none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echo4o.checkpoint.hf.probe import probe_outputs
from echo4o.checkpoint.hf.verify import exit_status, report_json, report_text, verify
from echo4o.checkpoint.shared_file import plan_file
from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from tests.checkpoint.hf.faults import BAD, TABLE, WARNINGS, first_shard, remove, set_value
from tests.checkpoint.hf.folders import LAYOUTS, change_json, change_tensors, copied
from tests.conftest import ROOT
from tests.train.tiny_run import tiny_config, write_tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: layout(root / name / "folder") for name, layout in LAYOUTS.items() if not (root / name).mkdir()}


@pytest.fixture
def folder(request, originals, tmp_path) -> Path:
    return copied(originals[request.param], tmp_path / "folder")


def errors_of(folder: Path, **options) -> list:
    return [finding for finding in verify(folder, **{"forward": False, **options}) if finding.level == "error"]


# ---------------------------------------------------------------- good folders


@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_good_folders_of_every_layout(folder) -> None:
    findings = verify(folder)
    assert exit_status(findings) == 0
    assert [finding for finding in findings if finding.level != "note"] == []
    assert any("forward pass" in finding.what and "finite" in finding.what for finding in findings)
    text = report_text(findings, folder)
    assert "nothing is wrong" in text and "every number finite" in text
    content = json.loads(report_json(findings, folder))
    assert content["ok"] and content["errors"] == 0 and len(content["findings"]) == content["notes"]


def test_example_model() -> None:
    assert exit_status(verify(ROOT / "data_examples" / "tiny_bagel")) == 0


@pytest.mark.parametrize("folder", ["upstream_training"], indirect=True)
def test_what_upstreams_training_leaves_out_and_adds_is_noted(folder) -> None:
    notes = [finding.what for finding in verify(folder, forward=False) if finding.level == "note"]
    assert any(TABLE in what and "computed" in what for what in notes)
    assert any("not looked at" in what for what in notes)


@pytest.mark.parametrize("kept", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("folder", ["bagel"], indirect=True)
def test_tied_embeddings_need_one_name_only(folder, kept) -> None:
    change_json(folder / "llm_config.json", tie_word_embeddings=True)
    other = {"lm_head": "model.embed_tokens", "model.embed_tokens": "lm_head"}[kept]
    change_tensors(folder / "ema.safetensors", lambda tensors: tensors.pop(f"language_model.{other}.weight"))
    assert errors_of(folder, forward=True) == []


@pytest.mark.parametrize("folder", ["adapter"], indirect=True)
def test_adapters_whose_base_is_elsewhere(folder, originals, tmp_path) -> None:
    change_json(folder / "adapter_config.json", base_model_name_or_path="owner/name")
    findings = verify(folder)
    assert exit_status(findings) == 0 and any("owner/name" in f.what for f in findings)
    assert any("no forward pass" in finding.what for finding in findings)
    base = originals["adapter"].with_name("folder_base")
    assert any("gives finite" in finding.what for finding in verify(folder, base=base))
    assert len(errors_of(folder, base=tmp_path / "nowhere")) == 1


# ---------------------------------------------------------------- bad folders


@pytest.mark.parametrize("fault", BAD)
def test_one_fault_gives_one_error_with_its_fix(fault, originals, tmp_path) -> None:
    layout, change, where, words = BAD[fault]
    folder = copied(originals[layout], tmp_path / "folder")
    change(folder)
    errors = errors_of(folder, forward=None)
    assert len(errors) == 1, report_text(errors, folder)
    assert re.fullmatch(where, errors[0].where) and re.search(words, errors[0].what), errors[0]
    assert errors[0].fix


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_not_a_folder(tmp_path, path) -> None:
    (tmp_path / "file").write_text("")
    (error,) = errors_of(tmp_path / path)
    assert "is a file" in error.what or "does not exist" in error.what


@pytest.mark.parametrize("folder", ["hf"], indirect=True)
def test_a_missing_shard_does_not_hide_other_faults(folder) -> None:
    """What lies in it is unknown; what lies elsewhere is still compared."""
    remove("model-00002-*")(folder)
    change_tensors(first_shard(folder), lambda tensors: tensors.popitem())
    assert ["lacks 1 of" in error.what for error in errors_of(folder)] == [False, True]


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("case", WARNINGS)
def test_what_works_here_but_may_not_elsewhere_is_a_warning(case, originals, tmp_path) -> None:
    layout, change, words = WARNINGS[case]
    folder = copied(originals[layout], tmp_path / "folder")
    change(folder)
    findings = verify(folder)
    assert exit_status(findings) == 0, report_text(findings, folder)
    (warning,) = [finding for finding in findings if finding.level == "warning"]
    assert words in warning.what and warning.fix


@pytest.mark.parametrize("folder", ["bagel"], indirect=True)
def test_a_table_in_another_precision_is_the_formulas(folder) -> None:
    change_tensors(folder / "ema.safetensors", lambda t: t.update({TABLE: t[TABLE].float()}))
    findings = verify(folder, forward=False)
    assert exit_status(findings) == 0
    assert any("mixes BF16" in finding.what for finding in findings)


# ---------------------------------------------------------------- how it is done


@pytest.mark.parametrize("folder", ["bagel"], indirect=True)
def test_values_and_kinds_can_be_left_out(folder) -> None:
    change_tensors(folder / "ema.safetensors", set_value("vae2llm.weight", float("nan")))
    assert errors_of(folder, values=False) == []
    (error,) = errors_of(folder, weights="model")
    assert "no model.safetensors" in error.what
    with pytest.raises(ValueError, match="ema, model"):
        verify(folder, weights="best")


@pytest.mark.parametrize("folder", ["bagel"], indirect=True)
def test_a_model_that_overflows_is_found_by_the_forward_pass(folder) -> None:
    change_tensors(folder / "ema.safetensors", lambda t: t["language_model.model.norm.weight"].fill_(3e38))
    (error,) = errors_of(folder, forward=True)
    assert "forward pass" in error.what and "not finite" in error.what
    assert errors_of(folder, forward=False) == []


def test_probe_is_deterministic_and_sees_every_part() -> None:
    model = Bagel(tiny_config()).requires_grad_(False)
    torch.nn.init.normal_(model.llm2vae.weight)
    state = torch.random.get_rng_state()
    first = probe_outputs(model)
    assert sorted(first) == ["ce", "last_hidden_state", "mse"] and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], tensor) for name, tensor in probe_outputs(model).items())
    for name in ("vae2llm.weight", "connector.fc1.weight", "language_model.lm_head.weight", "llm2vae.weight"):
        parameter = model.get_parameter(name)
        parameter.mul_(1.5)
        assert any(not torch.equal(first[key], tensor) for key, tensor in probe_outputs(model).items()), name
        parameter.div_(1.5)


@pytest.mark.parametrize("changes", [{"visual_gen": False}, {"visual_und": False}])
def test_probe_of_models_with_fewer_parts(changes) -> None:
    config = tiny_config()
    config.visual_gen, config.visual_und = changes.get("visual_gen", True), changes.get("visual_und", True)
    outputs = probe_outputs(Bagel(config))
    assert ("mse" in outputs) == config.visual_gen


def test_reading_values_takes_no_memory_to_speak_of(tmp_path) -> None:
    """400 MB of weights, of which a small buffer is in memory at a time."""
    layout = plan_file({"a": (torch.bfloat16, (200_000_000,))})
    (tmp_path / "ema.safetensors").write_bytes(layout.header)
    os.truncate(tmp_path / "ema.safetensors", layout.num_bytes)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from echo4o.checkpoint.hf.check_values import check_values\n"
        "from echo4o.checkpoint.hf.findings import Examination\n"
        "from echo4o.model.headers import read_header\n"
        "folder = Path(sys.argv[1]); header = read_header(folder / 'ema.safetensors')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); check_values(Examination(folder), {'ema.safetensors': header}, None, {})\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 40


def sparse_file(path: Path, shapes: dict[str, list[int]]) -> None:
    layout = plan_file({name: (torch.bfloat16, tuple(shape)) for name, shape in shapes.items()})
    path.write_bytes(layout.header)
    os.truncate(path, layout.num_bytes)


def test_the_published_model_by_its_manifest(shared, tmp_path) -> None:
    """1,223 + 244 tensors of the 7B model, as headers over empty space."""
    manifest = shared / "manifest" / "bagel_7b_mot.json"
    if not manifest.is_file():
        pytest.skip(f"{manifest} is absent")
    shapes = json.loads(manifest.read_text())
    assert (len(shapes["model"]), len(shapes["vae"])) == (1223, 244)
    llm = LLMConfig(3584, 18944, 28, 28, 4, 152064, 1e-6, 1e6, "Qwen2MoTDecoderLayer", True, False)
    vit = ViTConfig(1152, 4304, 27, 16, 980, 14)
    BagelConfig(llm, vit, VAEConfig(), max_latent_size=64).save_pretrained(tmp_path)
    sparse_file(tmp_path / "ema.safetensors", shapes["model"])
    sparse_file(tmp_path / "ae.safetensors", shapes["vae"])
    write_tokenizer(tmp_path)
    findings = verify(tmp_path, values=False, forward=False)
    assert exit_status(findings) == 0, report_text(findings, tmp_path)
    assert any("1,223 tensors, bfloat16, 29.2 GB" in finding.what for finding in findings)
    assert any("244 tensors" in finding.what for finding in findings)
    change_json(tmp_path / "config.json", max_latent_size=32)
    (error,) = errors_of(tmp_path, values=False)
    assert "is 32" in error.what and "64 × 64" in error.what
