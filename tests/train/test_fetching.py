"""Runs that start from a repository of the hub, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echo4o.checkpoint.adapters import load_bagel
from echo4o.checkpoint.hub import repository_of
from echo4o.config import ConfigError, load_config, plan_loading
from echo4o.train.fetching import fetch_model
from echo4o.train.processes import Processes
from echo4o.train.trainer import train
from tests.hub_server import Fault
from tests.train.launch import launch
from tests.train.tiny_run import run_config, write_bagel

NAME = "owner/tiny"


@pytest.fixture
def published(hub, tmp_path: Path):
    """The hub with a tiny BAGEL, and its commit."""
    folder = write_bagel(tmp_path / "bagel")
    return hub, hub.add(NAME, {path.name: path.read_bytes() for path in folder.iterdir()})


def test_a_run_starts_from_the_hub_and_goes_on_without_it(published, tmp_path, capsys):
    hub, commit = published
    out = tmp_path / "out"
    train(run_config(Path(NAME), out, total_steps=1, save_every=1, lora_rank=2))
    text = capsys.readouterr().out
    assert f"{NAME} is " in text and f"snapshots/{commit}" in text
    assert f"init_from: {NAME}\n" in (out / "config.yaml").read_text(), "the name, not a place of this machine"
    adapters = json.loads((out / "checkpoints" / "0000001" / "adapter_config.json").read_text())
    assert (adapters["base_model_name_or_path"], adapters["revision"]) == (NAME, commit)

    hub.requests.clear()
    hub.stop()
    train(run_config(Path(NAME), out, total_steps=2, save_every=1, lora_rank=2, auto_resume=True))
    assert (out / "checkpoints" / "0000002").is_dir()
    assert load_bagel(out / "checkpoints" / "0000002"), "the base is found by its name"


def test_what_the_hub_does_not_give_is_the_settings_fault(hub, tmp_path):
    with pytest.raises(ConfigError, match="the hub has no model owner/absent"):
        train(run_config(Path("owner/absent"), tmp_path / "out"))
    (tmp_path / "out").mkdir(exist_ok=True)
    hub.requests.clear()
    with pytest.raises(ConfigError, match="init_from is out/absent .*which is not a folder"):
        train(run_config(Path("out/absent"), tmp_path / "out"))
    assert not hub.requests


def test_names_are_located_where_a_start_reads_them(tmp_path):
    (tmp_path / "there").mkdir()
    asked: list[str] = []

    def locate(name: str) -> str:
        asked.append(name)
        return str(tmp_path / "there")

    flags = ["--init_from", "owner/a", "--finetune_from_hf", "True", "--model_path", "owner/b@v1"]
    plan = plan_loading(load_config(flags), None, locate)
    assert asked == ["owner/a", "owner/b@v1"]
    assert plan.init_from == plan.configs_from == str(tmp_path / "there")
    assert f"owner/b@v1 is {tmp_path / 'there'}" in plan.describe()
    asked.clear()
    plan_loading(load_config([*flags, "--auto_resume", "True"]), str(tmp_path / "there"), locate)
    assert not asked


def fetch_on_rank(names: list[str]) -> list[dict[str, str]]:
    """Of `launch`: what a rank gets for each name."""
    import torch

    processes = Processes.from_environment(60)
    processes.start(torch.device("cpu"))
    results = []
    for name in names:
        try:
            results.append({"folder": fetch_model(name, processes=processes)})
        except ConfigError as error:
            results.append({"error": str(error)})
    processes.close()
    return results


def test_one_process_of_a_host_downloads(published, tmp_path, monkeypatch):
    hub, commit = published
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hub.faults.append(Fault("/api/models/owner/new", status=404, code="RepoNotFound", times=None))
    first, second = launch(2, "tests.train.test_fetching:fetch_on_rank", [NAME, "owner/new", "a/b/c"])
    assert first == second and repository_of(first[0]["folder"]) == (NAME, commit)
    assert "the hub has no model owner/new" in first[1]["error"]
    assert first[2] == {"folder": "a/b/c"}, "left to the plan, which refuses it"
    files = hub.downloads()
    assert len(files) == len(set(files)) and "model.safetensors" in files
    assert sum(f"GET /api/models/{NAME}" in line for line in hub.requests) <= 3, "one process asks"
