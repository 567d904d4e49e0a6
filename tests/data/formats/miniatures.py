"""Every format in miniature, in its published layout: ``write(name, folder, num_rows=…) -> path``.

Rows are told apart by their images (a grey value of their own each) and texts; `expected` says what they must give.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

SIZE = (48, 32)


def picture(value: int, format: str = "JPEG", size: tuple[int, int] = SIZE) -> bytes:
    """A real image file of one grey value, with a mark so that no two rows are equal."""
    image = Image.new("RGB", size, (value % 256,) * 3)
    image.putpixel((value % size[0], (value // size[0]) % size[1]), (255, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 90} if format == "JPEG" else {}))
    return buffer.getvalue()


def reference(row: int, place: int) -> bytes:
    return picture(20 * row + place + 1, "PNG")


def target(row: int) -> bytes:
    return picture(20 * row + 100)


def num_references(row: int) -> int:
    """One to three, so that order and counts show."""
    return 1 + row % 3


def text(row: int) -> str:
    return f"Zeile {row}: „put “image 1” — 图{row} beside <image 1>” "


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def files(folder: Path, members: Iterable[tuple[str, bytes]]) -> None:
    for name, data in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def lines(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict], schema: pa.Schema | None = None, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def reference_names(row: int, prefix: str) -> list[str]:
    return [f"{prefix}{row:05d}_{place}.png" for place in range(num_references(row))]


def pictures_of(rows: range, prefix: str = "") -> list[tuple[str, bytes]]:
    """References and targets of rows, by the names used everywhere here."""
    found = []
    for row in rows:
        found += [(name, reference(row, place)) for place, name in enumerate(reference_names(row, prefix))]
        found.append((f"{prefix}{row:05d}.jpg", target(row)))
    return found


def echo4o_image(folder: Path, num_rows: int = 6, *, extracted: bool = False) -> Path:
    """Three parts; two shards each, named by their range; two text-to-image parts and a multi-reference one."""
    root = folder / "Echo-4o-Image"
    half = num_rows // 2
    for part, file in (
        ("Instruction-Following-Image", "Instruction-Following-Image.jsonl"),
        ("Surrel-Fantasy-Image", "conflict.jsonl"),
        ("Multi-Reference-Image", "Multi-Reference-Image.jsonl"),
    ):
        published = f"/Echo-4o-Image/{part}/images/"
        multi = part.startswith("Multi")
        rows = []
        for row in range(num_rows):
            line = {"task_type": "multi_ref" if multi else "t2i", "instruction": text(row)}
            if multi:
                line["input_images"] = reference_names(row, published)
            rows.append(line | {"output_image": f"{published}{row:05d}.jpg", "type": f"T{row % 2}"})
        lines(root / part / file, rows)
        for first, end in ((0, half), (half, num_rows)):
            members = pictures_of(range(first, end))
            members = members if multi else [(name, data) for name, data in members if name.endswith(".jpg")]
            if extracted:
                files(root / part / "images", members)
            else:
                tar(root / part / "images" / f"{first}-{end}.tar.gz", members, "w:gz")
    return root


def nano_consistent(folder: Path, num_rows: int = 6) -> Path:
    """Two categories; images of one in an archive, of the other extracted."""
    root = folder / "Nano-consistent-150k"
    for category, packed in (("background", True), ("hairstyle", False)):
        prefix = f"Nano-150k/{category}/"
        rows = [
            {
                "task_type": "edit" if num_references(row) == 1 else "multi",
                "instruction": text(row),
                "input_images": reference_names(row, prefix),
                "output_image": f"{prefix}{row:05d}.jpg",
            }
            for row in range(num_rows)
        ]
        lines(root / "json" / f"{category}_cleaned.jsonl", rows)
        if packed:
            tar(root / f"{category}.tar.gz", pictures_of(range(num_rows), f"{category}/"), "w:gz")
        else:
            files(root, pictures_of(range(num_rows), f"{category}/"))
    return root


def omnigen2(folder: Path, num_rows: int = 6) -> Path:
    """A mix of mixes: text to image, edits and in-context rows, paths as on the machine it was made on."""
    root = folder / "X2I2"
    for task, count in (("t2i", 0), ("edit", 1), ("ic", 2)):
        prefix = f"/share/project/data/X2I2/images/{task}/"
        rows = []
        for row in range(num_rows):
            line: dict = {"task_type": task, "instruction": text(row)}
            if count:
                line["input_images"] = [f"{prefix}{row:05d}_{place}.png" for place in range(count)]
            rows.append(line | {"output_image": f"{prefix}{row:05d}.jpg"})
        lines(root / "jsonls" / f"{task}.jsonl", rows)
        for row in range(num_rows):
            files(
                root / "images" / task,
                [(f"{row:05d}_{place}.png", reference(row, place)) for place in range(count)]
                + [(f"{row:05d}.jpg", target(row))],
            )
        ratio = {"t2i": 0.5, "edit": 0.25, "ic": 0.25}[task]
        mix = {"data": [{"path": f"jsonls/{task}.jsonl", "type": task, "ratio": 1}]}
        (root / f"{task}.yml").write_text(yaml.safe_dump(mix))
        entries = yaml.safe_load((root / "mix.yml").read_text())["data"] if (root / "mix.yml").exists() else []
        entries.append({"path": f"{task}.yml", "type": task, "ratio": ratio})
        (root / "mix.yml").write_text(yaml.safe_dump({"data": entries}))
    return root / "mix.yml"


def macro(folder: Path, num_rows: int = 6) -> Path:
    """``filter/{task}/{split}/{bracket}``: an array, an object of rows, and files of one row; images in an archive."""
    root = folder / "Macro" / "data"
    prefix = "data/final/customization/"

    def line(row: int) -> dict:
        return {
            "task": "customization",
            "idx": row,
            "prompt": text(row),
            "input_images": reference_names(row, prefix),
            "output_image": f"{prefix}{row:05d}.jpg",
            "scores": {"quality": 9.5, "following": [1, 2]},
        }

    tree = root / "filter" / "customization" / "train"
    for name in ("1-3", "4-5", "6-7"):
        (tree / name).mkdir(parents=True)
    third = num_rows // 3
    (tree / "1-3" / "a.json").write_text(json.dumps([line(row) for row in range(third)], ensure_ascii=False, indent=1))
    (tree / "4-5" / "b.json").write_text(json.dumps({f"k{row}": line(row) for row in range(third, 2 * third)}))
    for row in range(2 * third, num_rows):
        (tree / "6-7" / f"{row}.json").write_text(json.dumps(line(row), indent=2))
    held_out = root / "filter" / "customization" / "eval" / "1-3"
    held_out.mkdir(parents=True)
    (held_out / "a.json").write_text(json.dumps([line(0)]))
    tar(root / "customization.tar.gz", pictures_of(range(num_rows), prefix), "w:gz")
    return root


def mico(folder: Path, num_rows: int = 6) -> Path:
    """Parquet with ``image_list`` (target last) and a plain instruction, two files."""
    root = folder / "MICo-150K"
    half = num_rows // 2
    for number, rows in enumerate((range(half), range(half, num_rows))):
        table(
            root / "data" / f"train-{number:05d}-of-00002.parquet",
            [
                {
                    "image_list": [*(reference(row, place) for place in range(num_references(row))), target(row)],
                    "instruction": text(row),
                    "task": "hoi",
                }
                for row in rows
            ],
        )
    return root / "data"


def unireason(folder: Path, num_rows: int = 6) -> Path:
    """An array of edits with lists of one or more inputs, and one of text to image."""
    root = folder / "UniReason"
    edits = [
        {
            "input_image": reference_names(row, "editing/"),
            "output_image": f"editing/{row:05d}.jpg",
            "instruction": text(row),
            "reasoning": "because",
        }
        for row in range(num_rows)
    ]
    root.mkdir(parents=True)
    (root / "editing.json").write_text(json.dumps(edits, ensure_ascii=False, indent=2), encoding="utf-8")
    plain = [
        {"type": "T2I_SFT", "txt": text(row), "image": "", "image_path": f"image/{row:05d}.jpg"}
        for row in range(num_rows)
    ]
    (root / "t2i.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    files(root / "editing", pictures_of(range(num_rows)))
    files(root / "image", [(f"{row:05d}.jpg", target(row)) for row in range(num_rows)])
    return root


def blip3o(folder: Path, num_rows: int = 6) -> Path:
    """Two tars of jpg and txt, some with a further member, and a sample without a text."""
    root = folder / "BLIP3o-60k"
    half = num_rows // 2
    for number, rows in enumerate((range(half), range(half, num_rows))):
        members: list[tuple[str, bytes]] = []
        for row in rows:
            image = (f"{row:08d}.jpg", target(row))
            caption = (f"{row:08d}.txt", text(row).encode())
            members += [image, caption] if row % 2 else [caption, image]
            members.append((f"{row:08d}.meta.json", b"{}"))
        members.append((f"9{number:07d}.jpg", target(0)))
        tar(root / f"{number:05d}.tar", members)
    return root


def hf_dataset(folder: Path, num_rows: int = 6) -> Path:
    """What ``save_to_disk`` writes for a ``DatasetDict`` with a train split of two files."""
    root = folder / "saved"
    split = root / "train"
    split.mkdir(parents=True)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"instruction": pa.string(), "input_images": pa.list_(image), "output_image": image})
    half = num_rows // 2
    names = []
    for number, rows in enumerate((range(half), range(half, num_rows))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        values = [
            {
                "instruction": text(row),
                "input_images": [
                    {"bytes": reference(row, place), "path": f"{place}.png"} for place in range(num_references(row))
                ],
                "output_image": {"bytes": target(row), "path": None},
            }
            for row in rows
        ]
        with pa.OSFile(str(split / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(values, schema=schema), max_chunksize=2)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (split / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return root


def plain_folder(folder: Path, num_rows: int = 6) -> Path:
    """``targets/NAME.jpg``, ``refs/NAME/1.png …``, ``captions/NAME.txt``."""
    root = folder / "my_photos"
    for row in range(num_rows):
        name = f"product_{row}"
        files(root / "targets", [(f"{name}.jpg", target(row))])
        files(
            root / "refs" / name, [(f"{place + 1}.png", reference(row, place)) for place in range(num_references(row))]
        )
        files(root / "captions", [(f"{name}.txt", (text(row) + "\n").encode())])
    return root


def folder_csv(folder: Path, num_rows: int = 6) -> Path:
    """The same data with ``captions.csv``: one cell of references, names between semicolons."""
    root = folder / "my_photos_csv"
    files(root / "refs", [item for item in pictures_of(range(num_rows)) if item[0].endswith(".png")])
    files(root / "targets", [item for item in pictures_of(range(num_rows)) if item[0].endswith(".jpg")])
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "refs", "caption", "price"])
        writer.writeheader()
        for row in range(num_rows):
            names = "; ".join(reference_names(row, ""))
            writer.writerow({"file_name": f"{row:05d}.jpg", "refs": names, "caption": text(row), "price": row})
    return root


def bagel_multi_ref(folder: Path, num_rows: int = 6) -> Path:
    rows = [
        {
            "image_list": [*(reference(row, place) for place in range(num_references(row))), target(row)],
            "instruction_list": [[text(row)]],
        }
        for row in range(num_rows)
    ]
    return table(folder / "bagel_multi_ref" / "chunk_0.parquet", rows).parent


def bagel_t2i(folder: Path, num_rows: int = 6) -> Path:
    rows = [
        {"image": target(row), "captions": json.dumps({"short": text(row), "long": text(row) + "!"})}
        for row in range(num_rows)
    ]
    return table(folder / "bagel_t2i" / "0.parquet", rows).parent


def bagel_edit(folder: Path, num_rows: int = 6) -> Path:
    """Chains of three images with two paraphrases a step."""
    rows = [
        {
            "image_list": [reference(row, 0), reference(row, 1), target(row)],
            "instruction_list": [[f"a{row}", f"b{row}"], [text(row), f"d{row}"]],
        }
        for row in range(num_rows)
    ]
    return table(folder / "bagel_edit" / "0.parquet", rows).parent


def native(folder: Path, num_rows: int = 6) -> Path:
    root = folder / "native"
    rows = [
        {
            "instruction": text(row),
            "input_images": reference_names(row, "images/"),
            "output_image": f"images/{row:05d}.jpg",
            "source": "mini",
        }
        for row in range(num_rows)
    ]
    lines(root / "train.jsonl", rows)
    files(root / "images", pictures_of(range(num_rows)))
    return root


def native_vlm(folder: Path, num_rows: int = 6) -> Path:
    root = folder / "native_vlm"
    rows = [
        {
            "image": f"images/{row:05d}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>What? {text(row)}"},
                {"from": "gpt", "value": "A grey image."},
            ],
        }
        for row in range(num_rows)
    ]
    lines(root / "train.jsonl", rows)
    files(root / "images", [(f"{row:05d}.jpg", target(row)) for row in range(num_rows)])
    return root


#: Miniature → (its writer, its format, kinds of rows in it).
MINIATURES: dict[str, tuple[Callable[..., Path], str, tuple[str, ...]]] = {
    "echo4o_image": (echo4o_image, "echo4o_image", ("t2i", "multi_ref")),
    "nano_consistent": (nano_consistent, "nano_consistent", ("multi_ref", "edit")),
    "omnigen2": (omnigen2, "omnigen2", ("t2i", "edit", "multi_ref")),
    "macro": (macro, "macro", ("multi_ref",)),
    "mico": (mico, "mico", ("multi_ref",)),
    "unireason": (unireason, "unireason", ("edit", "multi_ref", "t2i")),
    "blip3o": (blip3o, "blip3o", ("t2i",)),
    "hf_dataset": (hf_dataset, "hf_dataset", ("multi_ref",)),
    "folder": (plain_folder, "folder", ("multi_ref",)),
    "folder_csv": (folder_csv, "folder", ("multi_ref",)),
    "bagel_multi_ref": (bagel_multi_ref, "bagel_parquet", ("multi_ref",)),
    "bagel_t2i": (bagel_t2i, "bagel_parquet", ("t2i",)),
    "bagel_edit": (bagel_edit, "bagel_parquet", ("edit",)),
    "native": (native, "native", ("multi_ref",)),
    "native_vlm": (native_vlm, "native", ("vlm",)),
}


def write(name: str, folder: Path, num_rows: int = 6) -> Path:
    """A miniature in `folder`; the path that a user would give."""
    return MINIATURES[name][0](Path(folder), num_rows)


def zip_of(path: Path, members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path
