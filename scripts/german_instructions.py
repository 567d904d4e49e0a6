"""python scripts/german_instructions.py --out runs/quickstart/data

The example task in another language: pictures as in data_examples, with German instructions. The tiny model that comes
with the examples has never read German, so fine-tuning it on these rows has something to teach. Writes

german/, dataset.yaml              400 rows for `echo4o train`, none of them one of the held-out rows
requests.jsonl, request_images/    six held-out instructions with their references, for `echo4o generate`
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import yaml
from example_scenes import DATA_SEED, Composition
from make_example_data import (
    encode,
    heldout_rows,
    multi_ref_rows,
    write_bytes,
    write_json,
    write_jsonl,
    write_parquet,
)

from echo4o.generate.contact_sheet import Row, write_contact_sheet

ROOT = Path(__file__).resolve().parents[1]
ROWS = 400
# So small a model needs less guidance and fewer steps than BAGEL.
SETTINGS = {"num_timesteps": 25, "cfg_text_scale": 2.0, "cfg_img_scale": 1.5}
PHRASES = (
    (r"Make the shape of (image \d) (\w+)\.", r"Mache die Form von \1 \2."),
    (r"Paint the shape of (image \d) (\w+)\.", r"Male die Form von \1 \2 an."),
    (r"Put the shape of (image \d) on a ([\w ]+) background\.", r"Setze die Form von \1 auf \2."),
    (r"Show the shape of (image \d) on a ([\w ]+) background\.", r"Zeige die Form von \1 auf \2."),
    (r"Put the shape of (image \d) on the background of (image \d)\.", r"Setze die Form von \1 vor \2."),
    (r"Use (image \d) as the background for the shape of (image \d)\.", r"Nimm \1 als Hintergrund der Form von \2."),
    (r"Draw the shape of (image \d) in the colour of (image \d)\.", r"Zeichne die Form von \1 in der Farbe von \2."),
    (r"Use the colour of (image \d) for the shape of (image \d)\.", r"Nimm die Farbe von \1 für die Form von \2."),
    (r"Fill the shape of (image \d) with the texture of (image \d)\.", r"Fülle die Form von \1 mit dem Muster von \2."),
    (r"Use the texture of (image \d) for the shape of (image \d)\.", r"Nimm das Muster von \1 für die Form von \2."),
    (
        r"Put the shape of (image \d), filled with the texture of (image \d), on the background of (image \d)",
        r"Setze die Form von \1 mit dem Muster von \2 vor \3",
    ),
    (
        r"On the background of (image \d), draw the shape of (image \d) with the texture of (image \d)",
        r"Zeichne vor \1 die Form von \2 mit dem Muster von \3",
    ),
    (r", and frame it in the colour of (image \d)\.", r" und rahme alles in der Farbe von \1."),
    (r"\blight blue\b", "Hellblau"),
    (r"\blight green\b", "Hellgrün"),
    (r"\bpink\b", "Rosa"),
    (r"\bsand\b", "Sand"),
    (r"\bgrey\b", "Grau"),
    (r"\bred\b", "rot"),
    (r"\byellow\b", "gelb"),
    (r"\bgreen\b", "grün"),
    (r"\bblue\b", "blau"),
    (r"\bpurple\b", "lila"),
    (r"\bimage (\d)", r"Bild \1"),
)


def german(row: Composition) -> Composition:
    """The example with its instruction in German ("orange" is the same word)."""
    text = row.instruction
    for pattern, words in PHRASES:
        text = re.sub(pattern, words, text)
    return replace(row, instruction=text)


def write_rows(folder: Path) -> None:
    rows = [german(row) for row in multi_ref_rows("train", ROWS, DATA_SEED, frozenset(heldout_rows()))]
    columns = {
        "image_list": [[encode(image) for image in row.images()] for row in rows],
        "instruction_list": [[[row.instruction]] for row in rows],
    }
    info = write_parquet(folder / "german" / "part-00000.parquet", columns)
    write_json(folder / "german_parquet_info.json", {"german/part-00000.parquet": info})
    groups = yaml.safe_load((ROOT / "data_examples" / "dataset.yaml").read_text(encoding="utf-8"))
    places = {"data_dir": "german", "parquet_info_path": "german_parquet_info.json"}
    groups["dataset_info"]["multi_ref"] = {"german": places}
    groups["multi_ref"] |= {"dataset_names": ["german"], "num_used_data": [1]}
    (folder / "dataset.yaml").write_text(yaml.safe_dump(groups, sort_keys=False), encoding="utf-8")


def write_requests(folder: Path) -> None:
    """Two held-out rows each with two, three and four references."""
    lines = []
    for count in (2, 3, 4):
        for row in [german(row) for row in heldout_rows() if len(row.references) == count][:2]:
            identity = f"{len(lines) + 1}_{row.task}"
            names = [f"request_images/{identity}_{place}.png" for place in range(1, count + 1)]
            for name, image in zip(names, row.images(), strict=False):
                write_bytes(folder / name, encode(image))
            lines.append({"id": identity, "prompt": row.instruction, "images": names, **SETTINGS})
    write_jsonl(folder / "requests.jsonl", lines)


def write_sheet(folder: Path, before: Path, after: Path, path: Path) -> None:
    """References and what was drawn from them before and after training, in one picture."""
    rows = []
    for line in (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        references = [folder / name for name in request["images"]]
        results = [drawn / f"{request['id']}.png" for drawn in (before, after)]
        rows.append(Row(request["prompt"], references, results, labels=("before", "after")))
    write_contact_sheet(rows, path, cell=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data")
    parser.add_argument("--sheet", type=Path, help="instead: write this picture of the results in --before and --after")
    parser.add_argument("--before", type=Path, help="results of `echo4o generate --requests` before training")
    parser.add_argument("--after", type=Path, help="and after it")
    arguments = parser.parse_args()
    if arguments.sheet is not None:
        if arguments.before is None or arguments.after is None:
            parser.error("--sheet needs --before and --after")
        return write_sheet(arguments.out, arguments.before, arguments.after, arguments.sheet)
    write_rows(arguments.out)
    write_requests(arguments.out)
    print(f"{arguments.out}: {ROWS} rows, dataset.yaml, requests.jsonl")


if __name__ == "__main__":
    main()
