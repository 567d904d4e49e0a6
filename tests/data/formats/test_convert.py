"""Conversions: every format both ways keeps bytes, order and text; killed at any time, the result is the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.data.errors import DataError
from echo4o.data.formats import FORMATS, Record, detect
from echo4o.data.formats.convert import ConvertOptions, convert
from echo4o.data.formats.first_look import first_look
from echo4o.data.formats.workspace import SKIPPED
from echo4o.data.inspection.opening import open_data
from echo4o.data.inspection.stats import mixture_stats
from echo4o.data.inspection.validate import validate
from tests.data.formats.miniatures import MINIATURES, write

ROOT = Path(__file__).resolve().parents[3]


def records(path: Path, name: str | None = None) -> list[Record]:
    store = FORMATS[name or detect(path)].open(path)
    return [store.record(row) for row in range(len(store))]


def texts(value: object) -> Iterator[str]:
    """All phrasings, in order, whatever the nesting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)


def content(found: list[Record]) -> list[tuple]:
    """Kind of images, bytes in order and texts of every row, in an order that does not depend on files."""
    rows = [
        (tuple(image.read() for image in record.images), tuple(texts(record.instructions)), record.target is None)
        for record in found
    ]
    return sorted(rows, key=lambda row: (row[1], [hashlib.sha256(data).digest() for data in row[0]]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert_to(source: Path, out: Path, target: str, **options: object):
    settings = {name: options.pop(name) for name in ("workers", "max_bad_share", "restart") if name in options}
    return convert(ConvertOptions(str(source), target, **options), out, **{"workers": 1, **settings})  # type: ignore[arg-type]


# ---------------------------------------------------------------- both ways


#: OmniGen2's rows hold one text and one step each.
ONE_TEXT = ("bagel_t2i", "bagel_edit")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in MINIATURES
        for target in ("bagel_parquet", "native", "omnigen2")
        if name != "native_vlm" and not (target == "omnigen2" and name in ONE_TEXT)
    ],
)
def test_there_and_back_keeps_bytes_order_and_text(name: str, target: str, tmp_path: Path) -> None:
    source = write(name, tmp_path / "source")
    original = content(records(source, MINIATURES[name][1]))
    first = convert_to(source, tmp_path / "there", target, source_format=MINIATURES[name][1])
    assert first.result.num_written == len(original) and not first.result.bad
    opened = open_data(tmp_path / "there" / "dataset.yaml")
    report = validate(opened)
    assert report.usable == report.rows == len(original) and not report.has_errors
    assert mixture_stats(opened, steps=1).samples > 0  # packs as training makes them
    found = [
        (tuple(image.read() for image in record.images), tuple(texts(record.instructions)), record.target is None)
        for record in records_of(tmp_path / "there", target)
    ]
    assert sorted(found, key=lambda row: (row[1], [hashlib.sha256(data).digest() for data in row[0]])) == original


def records_of(folder: Path, target: str) -> list[Record]:
    """All rows of a converted data set, whatever its kinds lie in."""
    info = yaml.safe_load((folder / "dataset.yaml").read_text())["dataset_info"]
    found: list[Record] = []
    for group, sets in info.items():
        kind = {"t2i_pretrain": "t2i", "unified_edit": "edit", "vlm_sft": "vlm"}.get(group, "multi_ref")
        for entry in sets.values():
            path = folder / (entry.get("path") or entry.get("jsonl_path") or entry["data_dir"])
            store = FORMATS["bagel_parquet" if target == "bagel_parquet" else "native"].open(path, kinds=(kind,))
            found += [store.record(row) for row in range(len(store))]
    return found


@pytest.mark.parametrize("name", ONE_TEXT)
def test_what_a_target_cannot_hold_is_counted(name: str, tmp_path: Path) -> None:
    source = write(name, tmp_path / "source")
    report = convert_to(source, tmp_path / "out", "omnigen2")
    assert report.result.notes["only the first phrasing kept: the target holds one text"] > 0
    steps = sum(len(record.images) - 1 if record.kind == "edit" else 1 for record in records(source))
    assert report.result.num_written == steps
    assert (name == "bagel_edit") == ("chains of edits: a row for every step" in report.result.notes)


def test_conversations_keep_their_turns_in_native_rows_only(tmp_path: Path) -> None:
    source = write("native_vlm", tmp_path / "source")
    report = convert_to(source, tmp_path / "there", "native")
    assert content(records_of(tmp_path / "there", "native")) == content(records(source)) and report.result.num_written
    with pytest.raises(DataError, match="no row|none of|nothing"):
        convert_to(source, tmp_path / "parquet", "bagel_parquet")
    assert not (tmp_path / "parquet").exists()


def test_tars_of_blip3o_hold_text_to_image_rows(tmp_path: Path) -> None:
    source = write("echo4o_image", tmp_path / "source")
    drawn = [record for record in records(source) if record.kind == "t2i"]
    report = convert_to(source, tmp_path / "tars", "blip3o")
    assert report.result.num_written == len(drawn) < len(records(source)) and sum(report.result.held_not.values())
    assert content(records(tmp_path / "tars", "blip3o")) == content(drawn)
    skipped = [json.loads(line) for line in (tmp_path / "tars" / SKIPPED).read_text().splitlines()]
    assert len(skipped) == len(records(source)) - len(drawn)
    with tarfile.open(next((tmp_path / "tars").rglob("*.tar"))) as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"jpg", "txt"}


def test_columns_of_the_parquet_are_upstreams(tmp_path: Path) -> None:
    convert_to(write("nano_consistent", tmp_path / "source"), tmp_path / "out", "bagel_parquet", kinds=("multi_ref",))
    (info,) = (tmp_path / "out").rglob("*info*.json")
    listed = json.loads(info.read_text())
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    assert len(listed) == len(files) and all(entry["num_row_groups"] >= 1 for entry in listed.values())
    schema = pq.read_schema(files[0])
    assert str(schema.field("image_list").type) == "list<element: binary>"
    assert str(schema.field("instruction_list").type) == "list<element: list<element: string>>"


# ---------------------------------------------------------------- stopped and bad


def test_processes_make_no_difference(tmp_path: Path) -> None:
    source = write("echo4o_image", tmp_path / "source", 12)
    convert_to(source, tmp_path / "one", "bagel_parquet", rows_per_part=4)
    convert_to(source, tmp_path / "two", "bagel_parquet", rows_per_part=4, workers=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: data.replace(b"one", b"two") for name, data in one.items()} == two


SLOW_CONVERSION = """
import sys, time
from echo4o.data.formats.convert import ConvertOptions, convert
from echo4o.data.formats.store import RecordStore
slow = RecordStore.record
def patient(self, row):
    time.sleep(0.004)
    return slow(self, row)
RecordStore.record = patient
print('ready', flush=True)
convert(ConvertOptions(sys.argv[1], sys.argv[3], rows_per_part=3), sys.argv[2], workers=int(sys.argv[4]))
"""


@pytest.mark.parametrize("target", ["bagel_parquet", pytest.param("native", marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_result_is_the_same_to_the_byte(target: str, tmp_path: Path) -> None:
    source = write("echo4o_image", tmp_path / "source", 20)
    place = tmp_path / "place"
    convert_to(source, place / "out", target, rows_per_part=3)
    wanted = contents(place / "out")
    shutil.rmtree(place / "out")
    rng = random.Random(7)
    for number in range(3):
        arguments = [str(source), str(place / "out"), target, str(1 + number % 2)]
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CONVERSION, *arguments],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.01, 0.15))
        os.killpg(process.pid, 9)
        process.wait(30)
        assert not (place / "out").exists() or contents(place / "out") == wanted
    convert_to(source, place / "out", target, rows_per_part=3, workers=2)
    assert contents(place / "out") == wanted
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_finished_conversion_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    source = write("native", tmp_path / "source")
    convert_to(source, tmp_path / "out", "bagel_parquet")
    before = contents(tmp_path / "out")
    assert convert_to(source, tmp_path / "out", "bagel_parquet").was_finished
    with pytest.raises(DataError, match="exists|another|finished"):
        convert_to(source, tmp_path / "out", "native")
    assert contents(tmp_path / "out") == before


def test_bad_rows_are_counted_listed_and_too_many_stop_it(tmp_path: Path) -> None:
    source = write("native", tmp_path / "source", 10)
    lines = source.read_text().splitlines() if source.is_file() else None
    file = source if lines is not None else next(source.rglob("*.jsonl"))
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, "{broken", *rows[:2]]) + "\n")
    report = convert_to(source, tmp_path / "out", "bagel_parquet")
    assert dict(report.result.bad) == {"invalid json": 1}
    (line,) = (tmp_path / "out" / SKIPPED).read_text().splitlines()
    assert json.loads(line)["reason"] == "invalid json" and f"{len(rows)}" in line
    with pytest.raises(DataError, match="max.bad.share|bad"):
        convert_to(source, tmp_path / "none", "bagel_parquet", max_bad_share=0.01)
    assert not (tmp_path / "none").exists()


def test_the_command_line(tmp_path: Path) -> None:
    source, runner = write("mico", tmp_path / "source"), CliRunner()
    dry = runner.invoke(app, ["data", "convert", str(source), str(tmp_path / "out"), "--dry-run"])
    assert dry.exit_code == 0 and "mico, 6 rows" in dry.output and not (tmp_path / "out").exists()
    done = runner.invoke(app, ["data", "convert", str(source), str(tmp_path / "out"), "--workers", "1"])
    assert done.exit_code == 0 and "6 rows (6 multi_ref)" in done.output, done.output
    again = runner.invoke(app, ["data", "convert", str(source), str(tmp_path / "out")])
    assert again.exit_code == 0 and "finished already" in again.output
    wrong = runner.invoke(app, ["data", "convert", str(source), str(tmp_path / "x"), "--to", "zip"])
    assert wrong.exit_code == 1 and "cannot convert to 'zip'; known: bagel_parquet" in wrong.output
    assert first_look(ConvertOptions(str(source), "native")).num_rows == 6
