"""Training from a cache: the same losses, refusals of what is stale, images that the cache lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from echo4o.config import ConfigError, load_config
from echo4o.data.errors import DataError
from echo4o.train.metrics import read_metrics
from echo4o.train.trainer import train
from tests.train.caching.small_cache import cache, picture, write_run
from tests.train.launch import train_on


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return write_run(tmp_path)


def trained(settings: dict[str, Any], out: Path, **changes: Any) -> list[dict[str, Any]]:
    train(load_config((), {**settings, "results_dir": str(out), "checkpoint_dir": str(out / "checkpoints"), **changes}))
    return read_metrics(out / "metrics.jsonl")


def curve(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that does not depend on the clock or the cache."""
    names = ("step", "loss", "mse", "ce", "grad_norm", "num_mse_tokens", "data/rows", "data/tokens")
    return [{name: record.get(name) for name in names} for record in records]


def test_same_losses_to_the_bit_also_with_workers_and_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache(settings, folder)
    plain = trained(settings, tmp_path / "plain", total_steps=6)
    cached = trained(settings, tmp_path / "cached", total_steps=6, latent_cache=str(folder), latent_cache_strict=True)
    assert curve(cached) == curve(plain)
    assert all(record["data/latents_encoded"] == 0 < record["data/latents_cached"] for record in cached)
    assert "data/latents_cached" not in plain[0]

    out, changes = tmp_path / "resumed", {"latent_cache": str(folder), "auto_resume": True, "num_workers": 2}
    trained(settings, out, total_steps=3, save_every=3, **changes)
    resumed = trained(settings, out, total_steps=6, **changes)
    assert curve(resumed) == curve(plain)


@pytest.mark.slow
def test_same_losses_on_two_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    cache(settings, tmp_path / "cache")
    runs = [
        {**settings, "results_dir": str(tmp_path / name), "checkpoint_dir": str(tmp_path / name / "c"), **changes}
        for name, changes in (("plain", {}), ("cached", {"latent_cache": str(tmp_path / "cache")}))
    ]
    train_on(2, *runs)
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "cached"))
    assert curve(one) == curve(other)


@pytest.mark.slow
def test_moments_in_bfloat16_change_losses_a_little(settings: dict[str, Any], tmp_path: Path) -> None:
    cache(settings, tmp_path / "cache", dtype="bfloat16")
    plain = trained(settings, tmp_path / "plain", total_steps=2)
    cached = trained(settings, tmp_path / "cached", total_steps=2, latent_cache=str(tmp_path / "cache"))
    for one, other in zip(plain, cached, strict=True):
        assert one["mse"] != other["mse"] and abs(one["mse"] / other["mse"] - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_products_in_bfloat16_lose_nothing_in_either_dtype(
    settings: dict[str, Any], tmp_path: Path, stored: str
) -> None:
    settings = {**settings, "dtype": "bfloat16", "total_steps": 2}
    cache(settings, tmp_path / "cache", dtype=stored)
    plain = trained(settings, tmp_path / "plain")
    assert curve(trained(settings, tmp_path / "cached", latent_cache=str(tmp_path / "cache"))) == curve(plain)


def test_what_the_cache_lacks_is_encoded_and_counted_or_refused(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache(settings, tmp_path / "cache")
    more = write_run(tmp_path / "more", num_rows=40, init_from=settings["init_from"], total_steps=4)
    plain = trained(more, tmp_path / "plain")
    cached = trained(more, tmp_path / "cached", latent_cache=str(tmp_path / "cache"))
    assert curve(cached) == curve(plain)
    assert sum(record["data/latents_encoded"] for record in cached) > 0
    assert sum("are not in latent_cache" in record.message for record in caplog.records) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+.*is not in .*vae(?s:.*)echo4o data cache"):
        trained(more, tmp_path / "strict", latent_cache=str(tmp_path / "cache"), latent_cache_strict=True)


def test_another_vae_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    cache(settings, tmp_path / "cache")
    path = Path(settings["init_from"]) / "ae.safetensors"
    weights = load_file(path)
    weights["encoder.conv_out.bias"] += 1e-3
    save_file(weights, path)
    with pytest.raises(DataError, match=r"stale: the weights of the VAE(?s:.*)echo4o data cache CONFIG --out"):
        trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="weights of the VAE.*\n.*another --out"):
        cache(settings, tmp_path / "cache")


def test_other_transforms_and_dtypes_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    cache(settings, tmp_path / "cache")
    with pytest.raises(DataError, match="stored dtype: float32 in the cache, bfloat16 here"):
        cache(settings, tmp_path / "cache", dtype="bfloat16")
    with pytest.raises(DataError, match=r"products \(--dtype\): float32 in the cache, bfloat16 here"):
        trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "cache"), dtype="bfloat16")
    path = Path(settings["dataset_config_file"])
    config = yaml.safe_load(path.read_text())
    config["multi_ref"]["image_transform_args"]["max_image_size"] = 48
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="stale: group multi_ref resizes its images by .*48"):
        trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "cache"))
    result, _ = cache(settings, tmp_path / "cache")
    assert 0 < result.num_encoded < result.num_images, "sizes that have not changed are there"
    trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "cache"), latent_cache_strict=True)


def test_a_cache_that_is_not_there(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="latent_cache is .*not a folder.*echo4o data cache"):
        trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no cache"):
        trained(settings, tmp_path / "out", latent_cache=str(tmp_path / "empty"))
    result, _ = cache({**settings, "latent_cache": str(tmp_path / "nowhere")}, tmp_path / "nowhere")
    assert result.num_encoded == 25, "the cache that the settings name can be made with these settings"


def test_broken_images_are_named_and_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    whole = picture(1003)
    (data / "target_3.png").write_bytes(whole[: len(whole) // 2])
    (data / "target_4.png").write_bytes(b"no image")
    with (data / "rows.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"instruction": "x", "input_images": ["gone.png"], "output_image": "1.png"}))
    result, said = cache(settings, tmp_path / "cache")
    report = "\n".join(said)
    assert result.failures.counts == {"image truncated": 1, "image unreadable": 2, "image missing": 1}
    assert "rows.jsonl:3: image truncated" in report and "rows.jsonl:12: image missing" in report
    again, _ = cache(settings, tmp_path / "cache")
    assert again.num_encoded == 0
    cached = trained(
        settings,
        tmp_path / "out",
        latent_cache=str(tmp_path / "cache"),
        latent_cache_strict=True,
        max_bad_row_share=0.9,
    )
    assert any(name.startswith("data/bad") for name in cached[-1])


def test_outputs_of_a_frozen_vision_encoder(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the vision encoder trains in this run(?s:.*)--freeze_vit True"):
        cache(settings, tmp_path / "cache", vit=True)
    frozen = {**settings, "freeze_vit": True, "total_steps": 4}
    write_run(tmp_path, num_rows=3)
    cache(frozen, tmp_path / "cache", vit=True)
    write_run(tmp_path)
    plain = trained(frozen, tmp_path / "plain")
    partly = trained(frozen, tmp_path / "partly", latent_cache=str(tmp_path / "cache"))
    assert sum(r["data/vit_cached"] for r in partly) > 0 < sum(r["data/vit_encoded"] for r in partly)
    cache(frozen, tmp_path / "cache", vit=True)
    wholly = trained(frozen, tmp_path / "wholly", latent_cache=str(tmp_path / "cache"), latent_cache_strict=True)
    assert not sum(r["data/vit_encoded"] + r["data/latents_encoded"] for r in wholly)
    for records in (partly, wholly):
        for one, other in zip(plain, records, strict=True):
            assert other["mse"] == pytest.approx(one["mse"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)

    resumed = {**frozen, "total_steps": 6, "auto_resume": True, "latent_cache": str(tmp_path / "cache")}
    again = trained(resumed, tmp_path / "wholly")
    assert len(again) == 6 and again[-1]["data/vit_encoded"] == 0
    training = trained({**settings, "total_steps": 1}, tmp_path / "trains", latent_cache=str(tmp_path / "cache"))
    assert training[0]["data/vit_cached"] == 0 < training[0]["data/latents_cached"]


def test_another_vision_encoder_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    frozen = {**settings, "lora_rank": 2}
    cache(frozen, tmp_path / "cache", vit=True)
    path = Path(settings["init_from"]) / "model.safetensors"
    weights = load_file(path)
    weights["vit_model.vision_model.encoder.layers.0.layer_norm1.bias"] += 1e-3
    save_file(weights, path)
    with pytest.raises(DataError, match="stale: the weights of the vision encoder"):
        trained(frozen, tmp_path / "out", latent_cache=str(tmp_path / "cache"))
