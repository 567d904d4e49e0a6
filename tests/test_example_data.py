"""The committed example data is what its script renders, and its targets are what the instructions say."""

import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data_examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("make_example_data")


@pytest.fixture
def scenes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("example_scenes")


def parquet_rows(split: str) -> list[dict]:
    return [
        row
        for path in sorted((DATA / "multi_ref" / split).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def native_rows() -> list[dict]:
    folder = DATA / "multi_ref_native"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    images = [[(folder / name).read_bytes() for name in [*row["input_images"], row["output_image"]]] for row in rows]
    return [
        {"image_list": row_images, "instruction_list": [[row["instruction"]]]}
        for row, row_images in zip(rows, images, strict=True)
    ]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_rendering_is_deterministic(script, tmp_path):
    counts = script.Counts(train=6, heldout=2, native=4, t2i=3, edit=3, vlm=3)
    for name in ("first", "second"):
        script.write_all(tmp_path / name, counts, seed=5)
        script.write_contact_sheet(tmp_path / name / "sheet.png", seed=5)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)


@pytest.mark.parametrize(("split", "count"), [("train", 320), ("heldout", 32), ("native", 40)])
def test_committed_rows_are_what_the_script_renders(script, split, count):
    """Pixels, not files: another version of zlib or pyarrow may pack the same pixels otherwise."""
    rows = native_rows() if split == "native" else parquet_rows(split)
    train = script.multi_ref_rows("train", 320, script.DATA_SEED)
    expected = train if split == "train" else script.multi_ref_rows(split, count, script.DATA_SEED, frozenset(train))
    assert len(rows) == count
    for row, composition in list(zip(rows, expected, strict=True))[:: 1 if count < 100 else 8]:
        assert row["instruction_list"] == [[composition.instruction]]
        for data, image in zip(row["image_list"], composition.images(), strict=True):
            assert np.array_equal(pixels(data), image)


def recompose(
    instruction: str, references: list[np.ndarray], names: dict[str, tuple[int, int, int]]
) -> np.ndarray | None:
    """The target from the reference pixels and the words alone; None where the sizes differ."""
    if len({image.shape for image in references}) > 1:
        return None

    def reference(pattern: str) -> np.ndarray | None:
        match = re.search(pattern, instruction)
        return references[int(match[1]) - 1].astype(float) if match else None

    drawing = reference(r"shape of image (\d)")
    colour = drawing[drawing.shape[0] // 2, :][np.argmin(drawing[drawing.shape[0] // 2].sum(-1))]
    coverage = ((255 - drawing) @ (255 - colour) / ((255 - colour) @ (255 - colour)))[..., None]
    fill, behind = np.broadcast_to(colour, drawing.shape), np.full_like(drawing, 255.0)
    if (texture := reference(r"texture of image (\d)")) is not None:
        fill = texture
    elif (other := reference(r"colour of image (\d)")) is not None and "frame" not in instruction:
        fill = other[other.shape[0] // 2, :][np.argmin(other[other.shape[0] // 2].sum(-1))]
    elif word := re.search(r"(?:Make|Paint) the shape of image \d (\w+)\.", instruction):
        fill = np.array(names[word[1]], dtype=float)
    if (scene := reference(r"background of image (\d)")) is None:
        scene = reference(r"Use image (\d) as the background")
    if scene is not None:
        behind = scene
    elif word := re.search(r"on a ([a-z ]+) background", instruction):
        behind = np.array(names[word[1]], dtype=float)
    target = behind * (1 - coverage) + fill * coverage
    if (card := reference(r"frame it in the colour of image (\d)")) is not None:
        target[:8], target[-8:], target[:, :8], target[:, -8:] = (card[0, 0],) * 4
    return target


@pytest.mark.parametrize("split", ["train", "heldout", "native"])
def test_targets_follow_from_the_references_and_the_words(scenes, split):
    rows = native_rows() if split == "native" else parquet_rows(split)
    names = scenes.COLOURS | scenes.PALE_COLOURS
    checked = {}
    for row in rows:
        images, (instruction,) = [pixels(data) for data in row["image_list"]], row["instruction_list"][0]
        if (expected := recompose(instruction, images[:-1], names)) is None:
            continue
        error = np.abs(expected - images[-1]).max()
        assert error <= 6, f"{instruction}: differs by {error:.1f} of 255"
        checked[len(images) - 1] = checked.get(len(images) - 1, 0) + 1
    assert set(checked) == {1, 2, 3, 4}
    assert sum(checked.values()) > 0.6 * len(rows)


def test_held_out_rows_are_not_trained_on():
    train = {(tuple(row["image_list"]), row["instruction_list"][0][0]) for row in parquet_rows("train")}
    heldout = {(tuple(row["image_list"]), row["instruction_list"][0][0]) for row in parquet_rows("heldout")}
    assert len(train) == 320
    assert not train & heldout


def test_sides_suit_the_tiny_model():
    sizes = {
        pixels(data).shape
        for split in ("train", "heldout")
        for row in parquet_rows(split)
        for data in row["image_list"]
    }
    assert len(sizes) >= 5
    assert all(side % 16 == 0 and 64 <= side <= 96 for height, width, _ in sizes for side in (height, width))


@pytest.mark.parametrize("name", ["dataset.yaml", "dataset_mixed.yaml", "dataset_heldout.yaml"])
def test_dataset_configs_point_at_files(name):
    config = yaml.safe_load((DATA / name).read_text())
    info = config.pop("dataset_info")
    for group, settings in config.items():
        for dataset, used in zip(settings["dataset_names"], settings["num_used_data"], strict=True):
            entry = info[group][dataset]
            if "jsonl_path" in entry:
                assert len((DATA / entry["jsonl_path"]).read_text().splitlines()) == used
                continue
            files = {f"{entry['data_dir']}/{path.name}": path for path in (DATA / entry["data_dir"]).glob("*.parquet")}
            assert len(files) == used
            if "parquet_info_path" in entry:
                stated = json.loads((DATA / entry["parquet_info_path"]).read_text())
                groups = {key: pq.read_metadata(path).num_row_groups for key, path in files.items()}
                assert {key: value["num_row_groups"] for key, value in stated.items()} == groups


def test_other_kinds_of_rows():
    for row in pq.read_table(DATA / "t2i" / "part-00000.parquet").to_pylist():
        assert pixels(row["image"]).shape[2] == 3
        assert all(isinstance(caption, str) for caption in json.loads(row["captions"]).values())
    for row in pq.read_table(DATA / "edit" / "part-00000.parquet").to_pylist():
        assert len(row["image_list"]) == len(row["instruction_list"]) + 1 in (2, 3)
        assert len({pixels(data).shape for data in row["image_list"]}) == 1
    for line in (DATA / "vlm" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        question, answer = row["conversations"]
        assert question["value"].count("<image>") == len(names)
        assert answer["from"] == "gpt" and answer["value"]
        assert all((DATA / "vlm" / name).exists() for name in names)


def test_files_are_small():
    files = [path for path in DATA.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = {path: path.stat().st_size for path in files}
    of_models = sum(size for path, size in sizes.items() if path.parent.name in ("tiny_vae", "tiny_bagel"))
    assert sum(sizes.values()) - of_models < 3e6
    assert sum(size for path, size in sizes.items() if path.parent.name == "tiny_bagel") < 5e6
