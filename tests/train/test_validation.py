"""Validation losses: fixed rows, noise and times; baselines that mean what their names say."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from echo4o.config import ConfigError
from echo4o.data.tokenizer import add_special_tokens, load_tokenizer
from echo4o.model import Bagel
from echo4o.model.embeddings import patchify_latents, shift_time, unpatchify_latents
from echo4o.model.vae import AutoEncoder
from echo4o.train.baselines import copy_errors
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.processes import Processes
from echo4o.train.validation import TIMES, Validation, build_validation, inverse_shift, losses_of
from tests.train.tiny_run import DATA, run_config, tiny_config, write_bagel

IMAGES = DATA / "multi_ref_native" / "images"


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("model") / "bagel")


@pytest.fixture(scope="module")
def vae(bagel: Path) -> AutoEncoder:
    return AutoEncoder.from_pretrained(bagel)


def validation_of(bagel: Path, out: Path, data: Path = DATA / "dataset_mixed.yaml", **changes: object) -> Validation:
    settings = {"eval_every": 1, "validation_config_file": str(data), "validation_rows": 3, **changes}
    tokenizer = load_tokenizer(bagel)
    found = build_validation(
        run_config(bagel, out, **settings), tiny_config(), tokenizer, add_special_tokens(tokenizer), Processes()
    )
    assert found is not None
    return found


def engine_of(bagel: Path) -> SingleProcessEngine:
    engine = SingleProcessEngine("cpu", "float32")
    engine.module = Bagel.from_pretrained(bagel).eval()
    return engine


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("t", TIMES)
def test_times_are_those_after_the_shift(t: float, shift: float) -> None:
    assert float(shift_time(torch.tensor(inverse_shift(t, shift)), shift)) == pytest.approx(t)


def test_a_measurement_repeats_and_depends_on_neither_packs_nor_dropout_nor_data_seed(
    bagel: Path, vae: AutoEncoder, tmp_path: Path
) -> None:
    engine = engine_of(bagel)
    validation = validation_of(bagel, tmp_path, timestep_shift=4.0)
    losses = validation.measure(engine, vae)
    assert losses is not None and losses == validation.measure(engine, vae)
    assert validation.num_rows == 12 and len(validation.data_sets) == 4
    kinds = {"val/mse": {"example_multi_ref", "example_t2i", "example_edit"}, "val/ce": {"example_vlm"}}
    kinds["val/predict_mean"], kinds["val/copy_reference"] = kinds["val/mse"], {"example_multi_ref", "example_edit"}
    for kind, names in kinds.items():
        assert {name.split("/")[2] for name in losses if name.startswith(f"{kind}/") and "/t_" not in name} == names
    assert losses["val/mse"] == pytest.approx(sum(losses[f"val/mse/t_{t}"] for t in TIMES) / len(TIMES))
    others = {"data_seed": 7, "expected_num_tokens": 60, "all_refs_dropout_prob": 1.0, "text_cond_dropout_prob": 1.0}
    other = validation_of(bagel, tmp_path, timestep_shift=4.0, **others)
    assert len(other.packs) > len(validation.packs)
    assert other.measure(engine, vae) == pytest.approx(losses, rel=1e-5)
    assert validation.measure(engine, vae, lambda: False) is None


class Predictor:
    """Stands for an engine whose model predicts the velocity that follows from a guess of the clean latents."""

    device, rank, world_size = torch.device("cpu"), 0, 1

    def __init__(self, guess: Callable) -> None:
        self.guess = guess

    def autocast(self):
        return contextlib.nullcontext()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def module(self, batch, latents, noise, return_hidden):
        noised = batch.packed_timesteps > -float("inf")
        t = batch.packed_timesteps.sigmoid()[noised][:, None]
        guess = self.guess(batch, latents)[noised]
        x = (1 - t) * latents[noised] + t * noise[noised]
        return SimpleNamespace(mse=((x - guess) / t - (noise - latents)[noised]) ** 2, ce=None)


def one_reference_data(folder: Path, size_of_reference: tuple[int, int]) -> Path:
    """Rows of one reference, as large as the target or not, and its target."""
    folder.mkdir()
    lines = []
    for number in (6, 14, 20):
        reference = next(path for path in (IMAGES / f"{number:03d}_1.png", IMAGES / "006_1.png") if path.exists())
        Image.open(reference).convert("RGB").resize(size_of_reference).save(folder / f"{number}_r.png")
        Image.open(IMAGES / f"{number:03d}_target.png").convert("RGB").resize((64, 48)).save(folder / f"{number}_t.png")
        lines.append(f'{{"instruction": "x", "input_images": ["{number}_r.png"], "output_image": "{number}_t.png"}}')
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "dataset_info": {"multi_ref": {"own": {"jsonl_path": "rows.jsonl"}}},
        "multi_ref": {
            "dataset_names": ["own"],
            "weight": 1,
            "image_transform_args": {"image_stride": 16, "max_image_size": 96, "min_image_size": 16},
            "vit_image_transform_args": {"image_stride": 14, "max_image_size": 56, "min_image_size": 28},
        },
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("size", [(64, 48), (32, 80)])
def test_baselines_are_the_losses_of_models_that_predict_so(
    bagel: Path, vae: AutoEncoder, tmp_path: Path, size: tuple[int, int]
) -> None:
    validation = validation_of(bagel, tmp_path, one_reference_data(tmp_path / "data", size))
    targets: list[torch.Tensor] = []

    def the_reference(batch, latents):
        targets.append(latents[batch.packed_timesteps > -float("inf")])
        images = unpatchify_latents(latents, batch.patchified_vae_latent_shapes, 2)
        pairs = zip(images[::2], images[1::2], strict=True)
        resized = [
            [r, torch.nn.functional.interpolate(r[None], t.shape[1:], mode="bilinear", align_corners=False)[0]]
            for r, t in pairs
        ]
        return patchify_latents([image for pair in resized for image in pair], 2)

    losses = validation.measure(Predictor(the_reference), vae)  # type: ignore[arg-type]
    for suffix in ("", "/own", "/own/t_0.9", "/t_0.1"):
        assert losses[f"val/mse{suffix}"] == pytest.approx(losses[f"val/copy_reference{suffix}"], rel=1e-4)
    per_pack = len(TIMES)
    mean = torch.cat(targets[::per_pack]).mean(dim=0)
    losses = validation.measure(Predictor(lambda _, latents: mean.expand_as(latents)), vae)  # type: ignore[arg-type]
    assert losses["val/mse/own"] == pytest.approx(losses["val/predict_mean/own"], rel=1e-4)


def test_the_best_reference_before_the_target_counts() -> None:
    def image(value: float, h: int, w: int) -> torch.Tensor:
        return torch.full((h * w, 16), value)

    images = [image(0.0, 2, 2), image(3.0, 1, 2), image(4.0, 2, 2), image(4.0, 2, 2), image(1.0, 1, 1)]
    grids = [(2, 2), (1, 2), (2, 2), (2, 2), (1, 1)]
    noised = torch.cat([torch.full((h * w,), number in (2, 4)) for number, (h, w) in enumerate(grids)])
    batch = SimpleNamespace(
        patchified_vae_latent_shapes=grids, packed_vae_token_indexes=torch.arange(15), sample_lens=[14, 1]
    )
    # References 0 and 3 of the target 4; its own clean copy comes later; the last target has no reference.
    assert copy_errors(batch, torch.cat(images), noised, 2) == [(4, pytest.approx(4.0))]  # type: ignore[arg-type]


def test_rows_are_a_prefix_of_a_fixed_order_and_too_long_ones_are_left_out(bagel: Path, tmp_path: Path) -> None:
    few, many = (
        {address for pack in validation_of(bagel, tmp_path, validation_rows=rows).packs for address in pack.addresses}
        for rows in (2, 5)
    )
    assert few < many and len(many) == 20
    short = validation_of(bagel, tmp_path, validation_rows=5, max_num_tokens_per_sample=100, expected_num_tokens=100)
    assert 0 < short.num_rows < 20
    with pytest.raises(ConfigError, match="raise max_num_tokens_per_sample"):
        validation_of(bagel, tmp_path, max_num_tokens_per_sample=5)


def test_a_row_that_cannot_be_read_is_left_out(
    bagel: Path, vae: AutoEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = one_reference_data(tmp_path / "data", (64, 48))
    validation = validation_of(bagel, tmp_path, data)
    (data.parent / "14_t.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        losses = validation.measure(engine_of(bagel), vae)
    assert losses and "a validation row is left out" in caplog.text and "14_t.png" in caplog.text
    for number in (6, 20):
        (data.parent / f"{number}_t.png").unlink()
    assert validation.measure(engine_of(bagel), vae) == {}


def test_the_runs_own_yaml_gives_its_validation_splits(bagel: Path, tmp_path: Path) -> None:
    for name in ("multi_ref", "multi_ref_native"):
        shutil.copytree(DATA / name, tmp_path / name)
    data = yaml.safe_load((DATA / "dataset.yaml").read_text())
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"none of its groups has a split: .* split: \{validation: 0.02\}"):
        validation_of(bagel, tmp_path, path, dataset_config_file=str(path))
    data["multi_ref"]["split"] = {"validation": 0.1}
    path.write_text(yaml.safe_dump(data))
    validation = validation_of(bagel, tmp_path, path, dataset_config_file=str(path), validation_rows=100)
    assert 15 < validation.num_rows < 60  # about a tenth of 360


def test_nothing_measured_is_no_loss() -> None:
    from echo4o.train.validation import Sums

    assert losses_of(Sums(["a", "b"], 4)) == {}
