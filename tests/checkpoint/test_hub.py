"""Models by the name of a folder or of a hub repository."""

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from echo4o.checkpoint.hub import cached_folder, local_folder, repository_of
from echo4o.generate.pipeline import Echo4oPipeline
from tests.hub_server import READ_TOKEN, TOKEN, Fault
from tests.train.tiny_run import write_bagel

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "config.json": b"{}",
    "ema.safetensors": bytes(range(256)) * 4000,
    "tokenizer.json": b'{"model": {}}',
    "optimizer.00000-of-00001.pt": b"state",
    "optimizer.safetensors": b"state",
    "pytorch_model.bin": b"weights",
    "modeling.py": b"import os",
    "picture.png": b"png",
}
FETCHED = {"config.json", "ema.safetensors", "tokenizer.json", "modeling.py"}


def refusal(model: str, revision: str | None = None) -> str:
    with pytest.raises(FileNotFoundError) as caught:
        local_folder(model, revision)
    assert caught.value.__cause__ is None
    return str(caught.value)


# ---------------------------------------------------------------- names


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_folder("owner/name") == Path("owner/name")
    assert "has no revisions" in refusal("owner/name", "main")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "a/b@"])
def test_what_cannot_be_a_repository_is_not_asked_for(name, hub):
    assert "pass a BAGEL folder" in refusal(name)
    assert not hub.requests


def test_a_mistyped_folder_is_not_asked_for(hub, tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "though runs is one; correct the path, or write runs/frist@main" in refusal("runs/frist")
    assert "cannot be a name on the hub" in refusal("owner--x/name")
    assert "name two revisions" in refusal("owner/name@a", "b")
    assert not hub.requests
    hub.add("runs/frist", MODEL)
    assert local_folder("runs/frist@main").is_dir()


# ---------------------------------------------------------------- downloads


def test_a_repository_is_downloaded_once(hub, capfd):
    commit = hub.add("owner/name", MODEL)
    folder = local_folder("owner/name")
    assert {path.name for path in folder.iterdir()} == FETCHED == set(hub.downloads())
    assert (folder / "ema.safetensors").read_bytes() == MODEL["ema.safetensors"]
    assert repository_of(folder) == ("owner/name", commit) and repository_of(folder.parent) is None
    out, err = capfd.readouterr()
    assert f"owner/name, commit {commit[:10]}: 1.0 MB to download to {constants.HF_HUB_CACHE}" in err
    assert not out

    hub.requests.clear()
    assert local_folder("owner/name") == folder == cached_folder("owner/name", commit)
    assert not hub.downloads() and not capfd.readouterr().err


def test_revisions(hub):
    first = hub.add("owner/name", MODEL)
    second = hub.add("owner/name", MODEL | {"config.json": b'{"new": 1}'}, branch="v2/final")
    assert local_folder("owner/name").name == first
    hub.requests.clear()
    assert local_folder("owner/name@v2/final").name == second == local_folder("owner/name", "v2/final").name
    assert hub.downloads() == ["config.json"], "what both revisions share is fetched once"
    assert local_folder(f"owner/name@{first}").name == first
    assert "has no branch, tag or commit v3" in refusal("owner/name", "v3")


def test_without_a_network_the_cache_serves(hub, capfd):
    commit = hub.add("owner/name", MODEL)
    folder = local_folder("owner/name")
    hub.stop()
    assert local_folder("owner/name") == folder == local_folder(f"owner/name@{commit}")
    assert f"the hub does not answer; commit {commit[:10]} of the cache" in capfd.readouterr().err
    message = refusal("owner/other")
    assert "cannot be reached" in message and "does not hold all of owner/other" in message


def test_offline_mode(hub, monkeypatch):
    hub.add("owner/name", MODEL)
    folder = local_folder("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    try:
        assert local_folder("owner/name") == folder
        assert "HF_HUB_OFFLINE" in refusal("owner/other")
    finally:
        monkeypatch.undo()
        close_session()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_breaks_is_taken_up_again(hub, monkeypatch, reset):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add("owner/name", MODEL)
    hub.faults.append(Fault("GET .*ema", after=400_000, reset=reset))
    folder = local_folder("owner/name")
    assert (folder / "ema.safetensors").read_bytes() == MODEL["ema.safetensors"]
    if not reset:
        assert [line for line in hub.requests if "Range: bytes=" in line and "bytes=0-" not in line]


def test_a_download_that_failed_goes_on_with_the_missing_files(hub):
    hub.add("owner/name", MODEL)
    fault = Fault("GET .*ema", status=500, times=None)
    hub.faults.append(fault)
    assert "the hub answers with status 500" in refusal("owner/name")
    hub.faults.clear()
    hub.requests.clear()
    assert local_folder("owner/name").is_dir()
    assert hub.downloads() == ["ema.safetensors"]


def test_a_busy_hub_is_asked_again(hub):
    hub.add("owner/name", MODEL)
    hub.faults.append(Fault("GET /api/models/owner/name", status=503, times=2))
    assert local_folder("owner/name").is_dir()
    hub.faults.append(Fault("/api/models", status=503, times=None))
    assert "cannot be reached" in refusal("owner/new")


def test_two_processes_download_once(hub, tmp_path):
    hub.add("owner/name", MODEL)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    code = "from echo4o.checkpoint.hub import local_folder; print(local_folder('owner/name'))"
    command = [sys.executable, "-c", code]
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folders = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(folders) == 1 and {path.name for path in Path(folders.pop()).iterdir()} == FETCHED
    assert sorted(hub.downloads()) == sorted(FETCHED)


def test_a_repository_draws(hub, tmp_path):
    written = write_bagel(tmp_path / "model")
    hub.add("owner/bagel", {path.name: path.read_bytes() for path in written.iterdir()})
    pipe = Echo4oPipeline.from_pretrained("owner/bagel", dtype="float32", device="cpu")
    assert pipe("a cat", height=32, width=32, num_timesteps=2).images


# ---------------------------------------------------------------- refusals


def test_a_repository_that_is_not_there(hub, monkeypatch):
    assert "the hub has no model owner/name, or it is private: then log in" in refusal("owner/name")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the hub has no model owner/name, or your token may not read it" in refusal("owner/name")


def test_private_and_gated_ones(hub, monkeypatch):
    hub.add("user/hidden", MODEL, private=True)
    hub.add("other/gated", MODEL, gated=True)
    assert "log in with `hf auth login`, or set HF_TOKEN" in refusal("user/hidden")
    gated = refusal("other/gated")
    assert f"accept its terms at {hub.endpoint}/other/gated and log in" in gated
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert local_folder("user/hidden").is_dir()
    assert "with an account that has accepted them" in refusal("other/gated")


def test_a_wrong_token_is_named_but_not_shown(hub, monkeypatch, capfd, caplog):
    hub.add("owner/name", MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_WrongWrongWrong")
    message = refusal("owner/name")
    assert "does not accept your token" in message
    out, err = capfd.readouterr()
    assert "WrongWrong" not in message + out + err + caplog.text


def test_what_holds_no_model(hub):
    hub.add("owner/pictures", {"a.png": b"png"})
    assert "holds no model: a.png" in refusal("owner/pictures")


def test_a_full_disk_is_seen_before_and_during_the_download(hub, monkeypatch):
    hub.add("owner/name", MODEL)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(1000))
        assert "needs 1.0 MB, and " in (message := refusal("owner/name")) and "1.0 kB left" in message
    assert not hub.downloads()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert "the disk is full: make room in" in refusal("owner/name")
