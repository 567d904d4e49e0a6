"""A training step on every published data set, read as it lies and converted to upstream's parquet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from echo4o.data.formats.convert import ConvertOptions, convert
from echo4o.data.inspection.opening import GROUP_OF
from echo4o.data.sources import read_dataset_config
from echo4o.train.metrics import read_metrics
from echo4o.train.trainer import train
from tests.data.formats.miniatures import MINIATURES, write
from tests.train.tiny_run import run_config, write_bagel

TRANSFORMS = {
    "image_transform_args": {"image_stride": 16, "max_image_size": 64, "min_image_size": 32},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 28, "min_image_size": 28},
}
OF_ANSWERS = {"image_transform_args": {"image_stride": 14, "max_image_size": 28, "min_image_size": 28}}


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("model") / "bagel")


def with_small_images(config: dict) -> dict:
    for group, settings in config.items():
        if group != "dataset_info":
            settings |= OF_ANSWERS if group == "vlm_sft" else TRANSFORMS
            if group == "t2i_pretrain":
                settings.pop("vit_image_transform_args", None)
    return config


def losses_of_a_step(bagel: Path, dataset_config: dict, folder: Path) -> list[float]:
    path = folder / "data.yaml"
    path.write_text(json.dumps(with_small_images(dataset_config)))
    with torch.random.fork_rng():
        train(run_config(bagel, folder / "out", dataset_config_file=str(path), total_steps=1, save_every=9))
    return [record["loss"] for record in read_metrics(folder / "out" / "metrics.jsonl")]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_step_on_each_as_it_lies(name: str, bagel: Path, tmp_path: Path) -> None:
    _, format, kinds = MINIATURES[name]
    path = write(name, tmp_path / "data")
    groups = [GROUP_OF[kind] for kind in kinds]
    config = {"dataset_info": {group: {"mine": {"format": format, "path": str(path)}} for group in groups}}
    config |= {group: {"dataset_names": ["mine"], "weight": 1} for group in groups}
    (loss,) = losses_of_a_step(bagel, config, tmp_path)
    assert math.isfinite(loss) and loss > 0


@pytest.mark.parametrize("name", ["echo4o_image", "bagel_edit"])
def test_a_step_on_converted_rows(name: str, bagel: Path, tmp_path: Path) -> None:
    source = write(name, tmp_path / "data")
    convert(ConvertOptions(str(source), "bagel_parquet"), tmp_path / "parquet", workers=1)
    config = read_dataset_config(tmp_path / "parquet" / "dataset.yaml")
    for sets in config["dataset_info"].values():
        for entry in sets.values():
            entry.update(
                {key: str(tmp_path / "parquet" / entry[key]) for key in entry if key.endswith(("_dir", "_path"))}
            )
    (loss,) = losses_of_a_step(bagel, config, tmp_path)
    assert math.isfinite(loss) and loss > 0
