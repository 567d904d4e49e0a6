"""Model cards: what they say, what they leave unsaid, and whether a person has edited them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.card import base_on_hub, is_generated, named, sealed, write_card
from echo4o.checkpoint.hf.card_training import without_places
from echo4o.config import load_config, save_resolved
from tests.checkpoint.hf.exported import BASE, write_exported

DATA = Path(__file__).resolve().parents[3] / "data_examples"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A results folder: settings, and losses of 200 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"init_from": "/home/somebody/models/BAGEL-7B-MoT", "lr": 3e-5, "total_steps": 200, "lora_rank": 8}
    places = {"results_dir": str(folder), "dataset_config_file": str(DATA / "dataset.yaml")}
    save_resolved(load_config((), settings | places), folder / "config.yaml")
    records = [{"step": step, "mse": 200 / step, "ce": None} for step in range(1, 201)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def full_card(tmp_path: Path, run: Path, layout: str = "both", **changes: object) -> str:
    scores = [
        {"benchmark": "OmniContext", "score": 7.9, "num_items": 400, "judge": "a judge", "note": "3 seeds"},
        {"benchmark": "GenEval++", "score": 0.61},
    ]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    provenance = write_exported(tmp_path / "out", layout, **changes)
    path = write_card(
        tmp_path / "out",
        provenance,
        run=run,
        config=(run / "config.yaml").read_text(),
        grid=tmp_path / "grid.png",
        evaluation=tmp_path / "scores.json",
        datasets=["owner/data"],
    )
    return path.read_text()


def test_everything_that_is_known_is_told(tmp_path, run):
    text = full_card(tmp_path, run)
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == (BASE, "finetune")
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "any-to-any", "transformers")
    assert data.datasets == ["owner/data"] and {"bagel", "multi-reference"} <= set(data.tags)
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [("OmniContext", 7.9), ("GenEval++", 0.61)]
    for words in (
        "600,000 parameters in bfloat16",
        "100 optimiser steps. Mean training loss over the last tenth of them: 2.09",
        "The run went on to step 200, which the plot shows too.",
        "| `lr` | `3e-05` | learning rate |",
        "| `lora_rank` | `8` |",
        "| multi_ref | 1, mandatory | example_multi_ref | 320 |",
        "| multi_ref | 1, mandatory | example_multi_ref_native | 40 |",
        "| OmniContext | 7.9 | 400 | a judge | 3 seeds |",
        "echo4o generate user/name --image cat.jpg",
        'AutoModel.from_pretrained("user/name", trust_remote_code=True',
        "python app.py --model_path MODEL",
        "the adapters are merged into these weights",
        "| `ae.safetensors` |",
        "commit `c0ffee`",
        "2505.14683",
        "2508.09987",
    ):
        assert words in text
    for picture in re.findall(r"!\[[^]]*]\(([^)]*)\)", text):
        assert Image.open(tmp_path / "out" / picture).size
    assert len(re.findall(r"!\[", text)) == 2


def test_no_place_of_a_machine_is_told(tmp_path, run):
    text = full_card(tmp_path, run, source="/home/somebody/run/checkpoints/0000100", base=None)
    for place in (str(tmp_path), "somebody", str(DATA.parent)):
        assert place not in text
    assert "init_from: models/BAGEL-7B-MoT" in text
    # The base is known from the settings, by the name of its folder.
    assert ModelCard(text).data.base_model == BASE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/a/b/c/d", "b/c/d"),
        ("x: '/data/sets/a.yaml', y", "x: 'data/sets/a.yaml', y"),
        ("1 / 2 and a/b and https://host/x/y and s3://b/c", "1 / 2 and a/b and https://host/x/y and s3://b/c"),
        ("home/me/run/checkpoints", "run/checkpoints"),
        ("/root/x", "x"),
        ("a: [/p/q, /r]", "a: [p/q, r]"),
    ],
)
def test_paths_are_cut(text, expected):
    assert without_places(text) == expected


def test_adapters_have_a_card_of_their_own(tmp_path, run):
    text = full_card(tmp_path, run, "adapter", base=None)
    data = ModelCard(text).data
    assert (data.base_model_relation, data.library_name, data.base_model) == ("adapter", "peft", BASE)
    assert "# LoRA adapters for BAGEL-7B-MoT" in text and "LoRA adapters (16 parameters)" in text
    assert 'PeftModel.from_pretrained(model, "user/name")' in text
    assert "echo4o merge ADAPTER --base BASE_FOLDER" in text and "fingerprint `ffffffffffffffff`" in text


def test_without_a_run_the_card_says_what_it_can(tmp_path):
    provenance = write_exported(tmp_path / "out", "bagel", base=None, commit=None, step=None)
    text = write_card(tmp_path / "out", provenance).read_text()
    data = ModelCard(text).data
    assert data.base_model is None and data.eval_results is None and data.library_name == "bagel-mot"
    assert "## Training" not in text and "![" not in text and "transformers import" not in text
    assert "No benchmark was run" in text and "None" not in text
    assert not (tmp_path / "out" / "assets").exists()


def test_a_dataset_file_that_is_gone_or_of_another_format_is_named(tmp_path):
    provenance = write_exported(tmp_path / "out")
    text = write_card(tmp_path / "out", provenance, config="dataset_config_file: /data/mine/sets.yaml\n").read_text()
    assert "The data sets are those of `data/mine/sets.yaml`" in text
    (tmp_path / "odd.yaml").write_text("- a list")
    config = yaml.safe_dump({"data": {"dataset_config_file": str(tmp_path / "odd.yaml")}})
    assert "odd.yaml`" in write_card(tmp_path / "out", provenance, config=config).read_text()


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"score": 1}]', '[{"benchmark": "x", "score": "high"}]', "no json", "null"]
)
def test_an_evaluation_that_is_none(tmp_path, content):
    provenance = write_exported(tmp_path / "out")
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(CheckpointError, match="scores.json is no evaluation"):
        write_card(tmp_path / "out", provenance, evaluation=tmp_path / "scores.json")


def test_a_grid_that_is_no_picture(tmp_path):
    provenance = write_exported(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no picture for the card"):
        write_card(tmp_path / "out", provenance, grid=tmp_path / "absent.png")


def test_what_names_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert base_on_hub("owner/name") == ("owner/name", None)
    assert base_on_hub("owner/name@abc") == ("owner/name", "abc")
    assert base_on_hub("/cache/models--owner--my--name/snapshots/abc") == ("owner/my--name", "abc")
    assert base_on_hub("hf/BAGEL-7B-MoT") == (BASE, None)
    assert base_on_hub("runs/first") == base_on_hub("/a/b/c") == base_on_hub(None) == (None, None)


def test_an_edited_card_is_told_from_a_generated_one(tmp_path):
    text = write_card(tmp_path / "out", write_exported(tmp_path / "out")).read_text()
    assert is_generated(text) and is_generated(text.replace("\n", "\r\n")) and is_generated(sealed(text))
    renamed = named(text, "me/model")
    assert is_generated(renamed) and "echo4o generate me/model" in renamed and "user/name" not in renamed
    edited = text.replace("## Limitations", "## What it cannot do")
    assert not is_generated(edited) and named(edited, "me/model") == edited
    assert not is_generated("# A card\n")
