"""What a PNG says of itself, and names of models."""

import json
import shutil

import pytest
import torch
from PIL import Image

from echo4o.checkpoint.adapters import AdapterConfig, write_adapter_config
from echo4o.checkpoint.weights import write_weights
from echo4o.generate.files import model_fingerprint, read_metadata, settings_dict, write_picture
from echo4o.generate.presets import PRESETS
from tests.train.tiny_run import tiny_config, write_bagel

PROMPT = "Ein schöner Würfel, 红色 🟥\nzweite Zeile"


def metadata(**changes):
    return {
        "version": "0.1.0",
        "prompt": PROMPT,
        "elements": [{"image": "a.png", "sha256": "00"}, PROMPT],
        "settings": settings_dict(PRESETS["edit"]),
        "seed": 3,
        "height": 32,
        "width": 48,
        "model": {"name": "tiny", "hash": "0123456789abcdef"},
        **changes,
    }


@pytest.fixture
def picture():
    return Image.new("RGB", (48, 32), (1, 2, 3))


def test_metadata_comes_back(tmp_path, picture):
    write_picture(picture, tmp_path / "a.png", metadata())
    assert read_metadata(tmp_path / "a.png") == json.loads(json.dumps(metadata()))
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()
    text = Image.open(tmp_path / "a.png").text["parameters"]  # pyright: ignore[reportAttributeAccessIssue]
    assert text == (
        f"{PROMPT}\nSteps: 49, Sampler: Euler, CFG scale: 4.0, Image CFG scale: 2.0, Shift: 3.0, Seed: 3, "
        "Size: 48x32, Model hash: 0123456789, Model: tiny, Version: echo4o 0.1.0"
    )


def test_settings_come_back():
    changed = PRESETS["t2i"].changed(cfg_text_scale=2.5, taylorseer=True, size_from=2)
    values = json.loads(json.dumps(settings_dict(changed)))
    values["cfg_interval"] = tuple(values["cfg_interval"])
    assert PRESETS["multi_ref"].changed(**values) == changed


def test_same_picture_and_metadata_are_the_same_bytes(tmp_path, picture):
    for name in ("a.png", "b.png"):
        write_picture(picture, tmp_path / name, metadata())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_failed_write_leaves_the_old_picture(tmp_path, picture, monkeypatch):
    write_picture(picture, tmp_path / "a.png", metadata())
    old = (tmp_path / "a.png").read_bytes()

    def full_disk(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_picture(picture, tmp_path / "a.png", metadata(seed=4))
    assert (tmp_path / "a.png").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_other_files_are_refused(tmp_path, picture):
    picture.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="only PNGs written by `echo4o generate` do"):
        read_metadata(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="not a picture"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "no.png")


def test_name_of_a_model_is_that_of_its_content(tmp_path):
    first = write_bagel(tmp_path / "first")
    known = model_fingerprint(first)
    shutil.copytree(first, tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == known
    content = bytearray((first / "ae.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "ae.safetensors").write_bytes(content)
    assert model_fingerprint(first) != known
    with pytest.raises(FileNotFoundError, match=r"no ema.safetensors: pass a BAGEL folder"):
        model_fingerprint(first, "ema")


def test_name_of_adapters_covers_their_base(tmp_path):
    base = write_bagel(tmp_path / "base", tiny_config())
    layer = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(32, 1)}
    write_weights(tensors, tmp_path / "lora", "adapter_model")
    write_adapter_config(tmp_path / "lora", AdapterConfig(str(base), 1, 1.0, 0.0, ("q_proj",)))
    known = model_fingerprint(tmp_path / "lora")
    shutil.move(base, tmp_path / "moved")
    assert model_fingerprint(tmp_path / "lora", base=tmp_path / "moved") == known
    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(tmp_path / "lora", base=tmp_path / "moved") != known
