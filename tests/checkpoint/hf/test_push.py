"""Uploads, against a hub of our own: what is sent, what stays, refusals, faults, and that no token gets out."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.card import is_generated, write_card
from echo4o.checkpoint.hf.findings import Finding
from echo4o.checkpoint.hf.push import Pushed, push
from tests.checkpoint.hf.exported import write_exported
from tests.hub_server import READ_TOKEN, TOKEN, Fault

MODEL = {"ema.safetensors", "ae.safetensors", "config.json", "llm_config.json", "tokenizer.json", "README.md"} | {
    "model.safetensors.index.json",
    "modeling_bagel.py",
    "echo4o_export.json",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "exported"
    write_card(out, write_exported(out))
    return out


@pytest.fixture
def logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def send(folder: Path, name: str = "user/model", **options) -> tuple[Pushed, str]:
    lines: list[str] = []
    done = push(folder, name, say=lines.append, **{"check": lambda folder: []} | options)
    return done, "\n".join(lines)


def refusal(folder: Path, name: str = "user/model", **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        send(folder, name, **options)
    return str(caught.value)


# ---------------------------------------------------------------- what is sent


def test_a_folder_becomes_one_commit(logged_in, folder):
    done, text = send(folder, private=True, message="First")
    there = logged_in.content("user/model")
    assert set(there) == MODEL | {".gitattributes"}
    assert there["ema.safetensors"] == (folder / "ema.safetensors").read_bytes()
    assert b"echo4o generate user/model" in there["README.md"] and is_generated(there["README.md"].decode())
    repository = logged_in.repositories["models", "user/model"]
    assert repository.private and repository.messages == ["First"]
    assert done.url == f"{logged_in.endpoint}/user/model" and done.url in text.splitlines()[-1]
    assert done.commit == repository.branches["main"]
    assert done.uploads[0].name == "README.md"
    assert "user/model (branch main): 9 files, 2.4 MB" in text and "2.4 MB  ema.safetensors" in text
    assert "user/name" in (folder / "README.md").read_text(), "the folder stays as it is"


def test_a_dry_run_lists_exactly_what_would_be_sent(hub, folder):
    done, text = send(folder, dry_run=True)
    assert not hub.requests and done.commit is None and "nothing was sent" in text
    listed = {line.split()[-1] for line in text.splitlines() if line.startswith("  ")}
    assert listed == MODEL == {upload.name for upload in done.uploads}
    sizes = {upload.name: upload.size for upload in done.uploads}
    real, _ = send(folder, token=TOKEN)
    assert sizes == {name: len(data) for name, data in hub.content("user/model").items() if name in MODEL}
    assert real.uploads == done.uploads


def test_what_is_no_part_of_a_model_stays(logged_in, folder, tmp_path):
    for name in (".hidden", "ema.safetensors.partial", "optimizer.pt", "notes.bin", "folder/.cache/x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    secret = tmp_path / "key"
    secret.write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.json").write_text("{}")
    (folder / "key").symlink_to(secret)
    (folder / "elsewhere").symlink_to(tmp_path / "elsewhere")
    _, text = send(folder)
    assert set(logged_in.content("user/model")) == MODEL | {".gitattributes"}
    assert "not sent: .hidden" in text and "elsewhere/ (a link)" in text and " key" in text


def test_links_to_files_of_a_model_are_followed(logged_in, folder, tmp_path):
    os.rename(folder / "ae.safetensors", tmp_path / "ae.safetensors")
    (folder / "ae.safetensors").symlink_to(tmp_path / "ae.safetensors")
    os.link(folder / "config.json", tmp_path / "config.json")
    send(folder)
    assert logged_in.content("user/model")["ae.safetensors"] == (tmp_path / "ae.safetensors").read_bytes()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "absent")
    assert "tokenizer.json is a link to nothing" in refusal(folder)


@pytest.mark.parametrize("name", ["training.json", "optimizer.safetensors", "ranks/0.json", "complete"])
def test_a_training_checkpoint_is_refused(hub, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert f"run `echo4o export {folder} --out DIR`" in refusal(folder)
    assert not hub.requests


def test_other_folders_and_names_are_refused(hub, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a folder" in refusal(tmp_path / "absent")
    assert "holds no weights" in refusal(tmp_path / "empty")
    for name in ("model", "a/b/c", "user/", "user/na me", "user/a--b", "https://hub/user/model", "user/.x"):
        assert "is no name of a repository" in refusal(folder, name)
    assert not hub.requests


def test_verification_comes_first(hub, folder):
    findings = [
        Finding("error", "ema.safetensors", "it is cut off", "export again"),
        Finding("warning", "config.json", "odd", "mend it"),
        Finding("note", ".", "fine"),
    ]
    message = refusal(folder, check=lambda folder: findings)
    assert "it is cut off" in message and "→ export again" in message and not hub.requests
    done, text = send(folder, check=lambda folder: findings, force=True, token=TOKEN)
    assert done.commit and "it is cut off" in text
    done, text = send(folder, check=lambda folder: findings[1:], token=TOKEN)
    assert "mend it" in text and "fine" not in text


# ---------------------------------------------------------------- again


def test_a_second_push_sends_what_changed(logged_in, folder):
    first, _ = send(folder)
    logged_in.requests.clear()
    again, _ = send(folder)
    assert again.commit == first.commit and not [line for line in logged_in.requests if line.startswith("PUT")]
    (folder / "config.json").write_text('{"new": 1}')
    changed, _ = send(folder)
    assert changed.commit != first.commit and logged_in.content("user/model")["config.json"] == b'{"new": 1}'
    assert not [line for line in logged_in.requests if line.startswith("PUT")]


def test_branches(logged_in, folder):
    send(folder)
    (folder / "config.json").write_text('{"new": 1}')
    done, text = send(folder, revision="step-100")
    assert done.url.endswith("user/model/tree/step-100") and "(branch step-100)" in text
    assert logged_in.content("user/model", "step-100")["config.json"] == b'{"new": 1}'
    assert logged_in.content("user/model")["config.json"] != b'{"new": 1}'


def test_a_card_that_was_edited_on_the_hub_is_kept(logged_in, folder):
    send(folder)
    content = logged_in.content("user/model") | {"README.md": b"# By hand\n"}
    logged_in.add("user/model", content)
    _, text = send(folder)
    assert logged_in.content("user/model")["README.md"] == b"# By hand\n" and "stays as it was edited" in text
    (folder / "README.md").write_text("# By hand, here\n")
    send(folder)
    assert logged_in.content("user/model")["README.md"] == b"# By hand, here\n"


def test_other_files_there_are_named_and_removed_on_request(logged_in, folder):
    old = {"model-00001-of-00002.safetensors": b"old", "README.md": b"# By hand\n", "notes.txt": b"x"}
    logged_in.add("user/model", old)
    _, text = send(folder)
    assert "also there, and kept: model-00001-of-00002.safetensors, notes.txt (--mirror" in text
    assert old.items() <= logged_in.content("user/model").items()
    _, text = send(folder, mirror=True)
    assert "removed there: model-00001-of-00002.safetensors, notes.txt" in text
    assert set(logged_in.content("user/model")) == MODEL


def test_a_push_that_broke_off_goes_on(logged_in, folder):
    (folder / "second.safetensors").write_bytes(bytes(1_500_000))
    fault = Fault("POST .*/commit/", status=500, times=None)
    logged_in.faults.append(fault)
    assert "status 500: try again later; what has been transferred is kept" in refusal(folder)
    assert set(logged_in.content("user/model")) == {".gitattributes"}, "nobody sees half a model"
    logged_in.faults.clear()
    logged_in.requests.clear()
    send(folder)
    assert not [line for line in logged_in.requests if line.startswith("PUT")]
    assert set(logged_in.content("user/model")) >= MODEL


@pytest.mark.parametrize(
    "fault",
    [Fault("PUT /lfs", reset=True), Fault("PUT /lfs", status=503), Fault("POST /api/repos/create", status=503)],
    ids=["connection cut", "busy", "busy at first"],
)
def test_passing_faults_are_passed_over(logged_in, folder, fault):
    logged_in.faults.append(fault)
    done, _ = send(folder)
    assert done.commit == logged_in.repositories["models", "user/model"].branches["main"]


# ---------------------------------------------------------------- refusals of the hub


def test_who_may_not_write(hub, folder, monkeypatch):
    assert "run `hf auth login`, or set HF_TOKEN" in refusal(folder) and not hub.requests
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "your token may not write to user/model" in refusal(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "your token may not write to somebody/model" in refusal(folder, "somebody/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong" * 6)
    assert "the hub does not accept your token (wrong or expired)" in refusal(folder)


def test_a_name_that_something_else_has(logged_in, folder):
    logged_in.add("user/model", {"a.txt": b""}, kind="datasets")
    assert "user/model is taken by something that is no model" in refusal(folder)


def test_a_public_repository_does_not_become_private(logged_in, folder):
    send(folder)
    _, text = send(folder, private=True)
    assert "was there before, and is public" in text


def test_without_a_network(logged_in, folder):
    logged_in.stop()
    assert f"not pushed: the hub {logged_in.endpoint} cannot be reached" in refusal(folder)


def test_a_token_in_a_file_is_not_published(logged_in, folder):
    (folder / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}")
    message = refusal(folder)
    assert "notes.txt holds what looks like an access token" in message and TOKEN not in message


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault("create", status=403, times=None, message=f"no rights for {TOKEN}"),
        Fault("create", status=400, times=None, message=f"bad token {TOKEN}"),
        Fault("preupload", status=500, times=None, message=f"Authorization: Bearer {TOKEN}"),
        Fault("PUT", status=400, times=None, message=TOKEN),
        Fault("commit", status=0, times=None),
    ],
    ids=["all is well", "403", "400", "500", "upload", "cut"],
)
def test_no_token_gets_out(logged_in, folder, fault, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logged_in.faults += [fault] if fault else []
    texts = []
    try:
        texts.append(send(folder)[1])
    except CheckpointError as error:
        texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert bool(fault) == (len(texts) == 3)
    captured = capfd.readouterr()
    everything = "\n".join([*texts, captured.out, captured.err, caplog.text])
    assert TOKEN not in everything and TOKEN[3:] not in everything
    assert logged_in.endpoint == constants.ENDPOINT
