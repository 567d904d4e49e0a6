"""python scripts/make_example_data.py --out data_examples

Renders the example data sets (they are committed; run this only to change them): a multi-reference task in upstream's
parquet and in native JSONL, and a few text-to-image, editing and question-answering rows. The task itself is in
``example_scenes.py``. The same arguments always give the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from example_scenes import (
    COLOURS,
    DATA_SEED,
    PALE_COLOURS,
    SHAPES,
    SIZES,
    Composition,
    Scene,
    captioned_scene,
    colour_name,
    compose,
    describe,
    plain,
)
from PIL import Image, ImageDraw

ROW_GROUP_ROWS = 20
CONTACT_SHEET_ROWS = 9
QUESTIONS: dict[str, Callable[[Scene], str]] = {
    "What shape is this?": lambda scene: scene.shape,
    "What colour is the shape?": lambda scene: colour_name(scene.fill),
    "What colour is the background?": lambda scene: colour_name(scene.background),
    "Describe the picture.": describe,
}


@dataclass(frozen=True)
class Counts:
    """Rows of each data set."""

    train: int = 320
    heldout: int = 32
    native: int = 40
    t2i: int = 40
    edit: int = 32
    vlm: int = 32


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Image file bytes; PNG keeps every pixel, JPEG is for data sets without an exact target."""
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"quality": 92, "subsampling": 0}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def multi_ref_rows(
    split: str, count: int, seed: int, excluded: frozenset[Composition] = frozenset()
) -> list[Composition]:
    """`count` examples of a split without repetitions and without those of another split."""
    rows: dict[Composition, None] = {}
    place = 0
    while len(rows) < count:
        row = compose(seed, split, place)
        place += 1
        if row not in excluded:
            rows.setdefault(row)
    return list(rows)


def heldout_rows() -> list[Composition]:
    """The rows of ``data_examples/multi_ref/heldout``."""
    counts = Counts()
    train = multi_ref_rows("train", counts.train, DATA_SEED)
    return multi_ref_rows("heldout", counts.heldout, DATA_SEED, frozenset(train))


def write_multi_ref(folder: Path, counts: Counts, seed: int) -> None:
    """Upstream's parquet: ``image_list`` (references, then the target) and ``instruction_list``."""
    train = multi_ref_rows("train", counts.train, seed)
    heldout = multi_ref_rows("heldout", counts.heldout, seed, frozenset(train))
    half = (len(train) + 1) // 2
    parts = {
        "train/part-00000.parquet": train[:half],
        "train/part-00001.parquet": train[half:],
        "heldout/part-00000.parquet": heldout,
    }
    info: dict[str, dict] = {"train": {}, "heldout": {}}
    for name, rows in parts.items():
        images = [[encode(image) for image in row.images()] for row in rows]
        columns = {"image_list": images, "instruction_list": [[[row.instruction]] for row in rows]}
        info[name.split("/")[0]] |= {f"multi_ref/{name}": write_parquet(folder / name, columns)}
    for split, files in info.items():
        write_json(folder / f"{split}_parquet_info.json", files)


def write_native(folder: Path, counts: Counts, seed: int) -> None:
    """Native JSONL: paths of image files, references in order. A few rows place them inside the instruction."""
    lines = []
    for index, row in enumerate(multi_ref_rows("native", counts.native, seed)):
        names = [f"images/{index:03d}_{place}.png" for place in range(1, len(row.references) + 1)]
        names.append(f"images/{index:03d}_target.png")
        for name, image in zip(names, row.images(), strict=True):
            write_bytes(folder / name, encode(image))
        lines.append({"instruction": row.instruction, "input_images": names[:-1], "output_image": names[-1]})
    write_jsonl(folder / "train.jsonl", lines)
    inline = [{**line, "instruction": inline_references(line["instruction"])} for line in lines[: counts.native // 4]]
    write_jsonl(folder / "inline.jsonl", inline)


def inline_references(instruction: str) -> str:
    """``image 2`` becomes the placeholder ``<image 2>``."""
    words = instruction.split(" image ")
    return words[0] + "".join(f" <image {rest[0]}>{rest[1:]}" for rest in words[1:])


def write_t2i(folder: Path, counts: Counts, seed: int) -> None:
    """Text-to-image parquet: ``image`` and a JSON object of captions, one of which is drawn."""
    images, captions = [], []
    for row in range(counts.t2i):
        draw = random.Random(f"{seed}/t2i/{row}")
        scene, caption = captioned_scene(draw)
        images.append(encode(scene.render(*draw.choice(SIZES)), "JPEG"))
        captions.append(json.dumps({"short": caption, "long": f"A simple drawing of {caption}."}))
    columns = {"image": images, "captions": captions}
    info = write_parquet(folder / "part-00000.parquet", columns)
    write_json(folder / "parquet_info.json", {"t2i/part-00000.parquet": info})


def write_edit(folder: Path, counts: Counts, seed: int) -> None:
    """Editing parquet: an image and one or two successive edits, with paraphrases of each."""
    images, instructions = [], []
    for row in range(counts.edit):
        draw = random.Random(f"{seed}/edit/{row}")
        scene, _ = captioned_scene(draw)
        scenes, size, steps = [scene], draw.choice(SIZES), []
        for _ in range(draw.choice((1, 2))):
            scene, texts = edit(scene, draw)
            scenes.append(scene)
            steps.append(texts)
        images.append([encode(scene.render(*size), "JPEG") for scene in scenes])
        instructions.append(steps)
    columns = {"image_list": images, "instruction_list": instructions}
    info = write_parquet(folder / "part-00000.parquet", columns)
    write_json(folder / "parquet_info.json", {"edit/part-00000.parquet": info})


def edit(scene: Scene, draw: random.Random) -> tuple[Scene, list[str]]:
    """A changed scene and two ways to ask for it."""
    match draw.choice(("colour", "shape", "background")):
        case "colour":
            name = draw.choice([name for name, value in COLOURS.items() if plain(value) != scene.fill])
            return replace(scene, fill=plain(COLOURS[name])), [f"Make the {scene.shape} {name}.", f"Paint it {name}."]
        case "shape":
            shape = draw.choice([shape for shape in SHAPES if shape != scene.shape])
            return replace(scene, shape=shape), [f"Turn the {scene.shape} into a {shape}.", f"Replace it by a {shape}."]
    name = draw.choice([name for name, value in PALE_COLOURS.items() if plain(value) != scene.background])
    texts = [f"Make the background {name}.", f"Put the {scene.shape} on a {name} background."]
    return replace(scene, background=plain(PALE_COLOURS[name])), texts


def write_vlm(folder: Path, counts: Counts, seed: int) -> None:
    """Questions and answers about one or two pictures, as conversations in JSONL."""
    lines = []
    for row in range(counts.vlm):
        draw = random.Random(f"{seed}/vlm/{row}")
        question = draw.choice(list(QUESTIONS))
        names, answers = [], []
        for place in range(draw.choice((1, 1, 2))):
            scene, _ = captioned_scene(draw)
            names.append(f"images/{row:03d}_{place + 1}.jpg")
            answers.append(QUESTIONS[question](scene))
            write_bytes(folder / names[-1], encode(scene.render(*draw.choice(SIZES)), "JPEG"))
        turns = [
            {"from": "human", "value": "<image>" * len(names) + question},
            {"from": "gpt", "value": ", ".join(answers)},
        ]
        lines.append({"image": names if len(names) > 1 else names[0], "conversations": turns})
    write_jsonl(folder / "train.jsonl", lines)


def contact_sheet(rows: Sequence[Composition], zoom: int = 2) -> Image.Image:
    """One line an example: the instruction, and below it the references, an arrow and the target."""
    step, margin, caption = max(max(size) for size in SIZES) * zoom + 24, 12, 34
    heights = [caption + max(image.shape[0] for image in row.images()) * zoom + margin for row in rows]
    sheet = Image.new("RGB", (margin + 5 * step, sum(heights) + margin), (246, 246, 246))
    pen = ImageDraw.Draw(sheet)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        pen.text((margin, top), row.instruction, fill=(0, 0, 0))
        images = row.images()
        for place, pixels in enumerate(images):
            is_target = place == len(images) - 1
            left = margin + place * step
            pen.text((left, top + 17), "target" if is_target else f"image {place + 1}", fill=(110, 110, 110))
            picture = Image.fromarray(pixels)
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + caption - 2))
            outline = (20, 20, 20) if is_target else (170, 170, 170)
            pen.rectangle(
                (left - 1, top + caption - 3, left + picture.width, top + caption - 2 + picture.height), outline=outline
            )
        top += height
    return sheet


def write_contact_sheet(path: Path, seed: int) -> None:
    """Low pictures with every task, texture and shape, as far as ten lines go."""
    chosen: list[Composition] = []
    seen: set[object] = set()
    rows = [row for row in multi_ref_rows("train", Counts.train, seed) if max(s[1] for _, s in row.references) <= 80]
    for _ in range(CONTACT_SHEET_ROWS):
        best = max(rows, key=lambda row: len(_features(row) - seen))
        chosen.append(best)
        seen |= _features(best)
        rows.remove(best)
    sheet = contact_sheet(sorted(chosen, key=lambda row: len(row.references)))
    sheet.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def _features(row: Composition) -> set[object]:
    target = row.target[0]
    return {row.task, target.shape, target.fill.kind, target.background.kind, row.target[1], target.fill.colours[0]}


def write_parquet(path: Path, columns: dict[str, list]) -> dict:
    """Write a file with small row groups; returns its ``parquet_info`` entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    # Images are compressed already, and an uncompressed file does not depend on the compressor's version.
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False)
    return {"num_row_groups": pq.read_metadata(path).num_row_groups, "num_rows": table.num_rows}


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_json(path: Path, values: dict) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_all(folder: Path, counts: Counts, seed: int) -> None:
    write_multi_ref(folder / "multi_ref", counts, seed)
    write_native(folder / "multi_ref_native", counts, seed)
    write_t2i(folder / "t2i", counts, seed)
    write_edit(folder / "edit", counts, seed)
    write_vlm(folder / "vlm", counts, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, default=Path("data_examples"))
    parser.add_argument("--seed", type=int, default=DATA_SEED)
    for name, count in vars(Counts()).items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows (default {count})")
    arguments = parser.parse_args()
    counts = Counts(**{name: getattr(arguments, name) for name in vars(Counts())})
    write_all(arguments.out, counts, arguments.seed)
    write_contact_sheet(arguments.out / "contact_sheet.png", arguments.seed)
    files = [path for path in arguments.out.rglob("*") if path.is_file()]
    print(f"{arguments.out}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
