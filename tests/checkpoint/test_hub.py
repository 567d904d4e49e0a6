"""Models by the name of a folder or of a hub repository."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from echo4o.checkpoint.hub import local_folder
from echo4o.generate.pipeline import Echo4oPipeline
from tests.train.tiny_run import write_bagel


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_folder("owner/name") == Path("owner/name")


def test_a_repository_is_downloaded_and_draws(tmp_path, monkeypatch):
    folder, asked = write_bagel(tmp_path / "snapshot"), []
    monkeypatch.chdir(tmp_path)

    def download(name, allow_patterns):
        asked.append(name)
        assert {"*.json", "*.safetensors", "*.txt"} <= set(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipe = Echo4oPipeline.from_pretrained("owner/name", dtype="float32", device="cpu")
    assert asked == ["owner/name"]
    assert pipe("a cat", height=32, width=32, num_timesteps=2).images


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c"])
def test_what_cannot_be_a_repository_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match="pass a BAGEL folder"):
        local_folder(name)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(name, allow_patterns):
        raise LocalEntryNotFoundError("cannot reach the hub\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="owner/name is no folder here.*cannot reach the hub$"):
        local_folder("owner/name")
