"""The tiny BAGEL folder loads as any BAGEL folder does, and its autoencoder reconstructs the example pictures."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from echo4o.data.tokenizer import add_special_tokens, load_tokenizer
from echo4o.model import Bagel, BagelConfig
from echo4o.model.vae import AutoEncoder

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data_examples"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("make_tiny_bagel")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny_bagel")
    script.build(path, DATA / "tiny_vae", DATA, hidden=32, layers=1, heads=2, seed=3)
    return path


def test_tokenizer(folder, script):
    tokenizer = load_tokenizer(folder)
    special = add_special_tokens(tokenizer)
    assert special.num_new_tokens == 0
    assert len(tokenizer) == BagelConfig.from_pretrained(folder).llm.vocab_size
    for text in [*list(script.example_texts(DATA))[::50], "naïve 你好 <|vision_start|>\n  x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("Fill the shape of image 1 with the texture of image 2.")
    assert len(ids) <= 16
    assert special.bos_token_id not in ids
    assert tokenizer.encode("<|im_end|>") == [special.eos_token_id]
    stated = json.loads((folder / "generation_config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (special.bos_token_id, special.eos_token_id)


def test_model(folder, script):
    config = BagelConfig.from_pretrained(folder)
    assert config == script.tiny_config(config.llm.vocab_size, config.vae, hidden=32, layers=1, heads=2)
    model = Bagel.from_pretrained(folder)
    saved = load_file(folder / "ema.safetensors")
    assert set(model.state_dict()) == set(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    prefix = "language_model.model.layers.0.self_attn.q_proj"
    assert torch.equal(saved[f"{prefix}.weight"], saved[f"{prefix}_moe_gen.weight"])


def test_building_is_deterministic(folder, script, tmp_path):
    torch.manual_seed(99)
    script.build(tmp_path, DATA / "tiny_vae", DATA, hidden=32, layers=1, heads=2, seed=3)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_sizes_that_do_not_fit(script, tmp_path):
    with pytest.raises(SystemExit, match="--hidden 30 and --heads 4 do not fit"):
        script.build(tmp_path / "no", DATA / "tiny_vae", DATA, hidden=30, layers=1, heads=4, seed=0)
    assert not (tmp_path / "no").exists()


@torch.no_grad()
def test_autoencoder_reconstructs_held_out_pictures(folder):
    model = AutoEncoder.from_pretrained(folder)
    assert model.config == BagelConfig.from_pretrained(folder).vae
    rows = pq.read_table(DATA / "multi_ref" / "heldout").to_pylist()[:10]
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for row in rows for data in row["image_list"]]
    inputs = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1 for image in images]
    generators = [torch.Generator().manual_seed(index) for index in range(len(inputs))]
    latents = model.encode_images(inputs, generators=generators)
    ratios = []
    for image, latent in zip(inputs, latents, strict=True):
        error = (model.decode(latent[None])[0].clamp(-1, 1) - image).square().mean()
        ratios.append(-10 * torch.log10(error / 4).item())
    assert np.mean(ratios) > 28
    values = torch.cat([latent.flatten() for latent in latents])
    assert abs(values.mean().item()) < 0.3
    assert 0.8 < values.std().item() < 1.2
