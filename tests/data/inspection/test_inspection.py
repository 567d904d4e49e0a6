"""Data looked at before training: what is wrong is found and named, pages show what the model sees, counts are real."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from echo4o.data.errors import DataError
from echo4o.data.inspection.duplicates import near_groups
from echo4o.data.inspection.opening import Opened, open_data
from echo4o.data.inspection.page import write_page
from echo4o.data.inspection.report import report_json, report_text
from echo4o.data.inspection.stats import mixture_stats, stats_json, stats_text
from echo4o.data.inspection.validate import DataReport, validate
from echo4o.data.streams import RankStreams, StreamLayout
from tests.data.formats.miniatures import MINIATURES, write

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "data_examples"


def picture(seed: int, size: tuple[int, int] = (64, 64), quality: int | None = None) -> bytes:
    rng = random.Random(seed)
    image = Image.new("RGB", size, (seed * 37 % 256, 200, 90))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.ellipse((x, y, x + rng.randrange(8, 40), y + rng.randrange(8, 40)), fill=(rng.randrange(256), 20, 60))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality) if quality else image.save(data, "PNG")
    return data.getvalue()


def write_rows(folder: Path, rows: list[dict | str], pictures: dict[str, bytes]) -> Path:
    """A data set of our own JSONL and the YAML that trains on it."""
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    transform = {"max_image_size": 96, "min_image_size": 64}
    config = {
        "dataset_info": {"multi_ref": {"mine": {"data_dir": str(folder), "jsonl_path": str(folder / "rows.jsonl")}}},
        "multi_ref": {
            "dataset_names": ["mine"],
            "weight": 1,
            "image_transform_args": {"image_stride": 16, **transform},
            "vit_image_transform_args": {"image_stride": 14, "max_image_size": 56, "min_image_size": 28},
        },
    }
    path = folder / "data.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def row(text: str, references: list[str], target: str) -> dict:
    return {"instruction": text, "input_images": references, "output_image": target}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """One row of each fault, among good ones."""
    folder = tmp_path_factory.mktemp("faulty")
    pictures = {f"{number}.png": picture(number) for number in range(8)}
    pictures |= {
        "cut.png": picture(20)[:200],
        "empty.png": b"",
        "text.png": b"no picture",
        "same.jpg": picture(30, quality=95),
        "alike.jpg": picture(30, quality=60),
        "long.png": picture(40, (400, 60)),
    }
    rows: list[dict | str] = [row(f"text {n}", [f"{n}.png"], f"{n + 1}.png") for n in range(5)]
    rows += [
        row("text 0", ["0.png"], "1.png"),  # 5: a copy of row 0
        row("copy", ["2.png", "3.png"], "3.png"),  # 6: the target is a reference
        row("   ", ["0.png"], "6.png"),  # 7: an empty instruction
        row("twice", ["4.png", "4.png"], "7.png"),  # 8: the same reference twice
        row("broken", ["cut.png"], "1.png"),  # 9
        row("no bytes", ["empty.png"], "1.png"),  # 10
        row("no picture", ["text.png"], "1.png"),  # 11
        row("missing", ["nowhere.png"], "1.png"),  # 12
        "{not json",  # 13
        row("no target", ["0.png"], ""),  # 14
        row("alike", ["1.png"], "same.jpg"),  # 15
        row("alike", ["2.png"], "alike.jpg"),  # 16
        row("long", ["long.png"], "6.png"),  # 17
        row("nested", [["0.png"]], "1.png"),  # 18: wrong nesting
    ]
    return open_data(write_rows(folder, rows, pictures))


@pytest.fixture(scope="module")
def report(faulty: Opened) -> DataReport:
    return validate(faulty, workers=2)


@pytest.mark.parametrize(
    ("match", "level", "rows", "fix"),
    [
        ("image truncated", "error", [9], "copy or download the image again"),
        ("image empty", "error", [10], "copy it again"),
        ("image unreadable", "error", [11], "encode it as PNG or JPEG"),
        ("image missing: ", "error", [12], "say where the images are"),
        ("invalid json", "error", [13], "one JSON object a line"),
        ("instruction missing", "error", [7], "add an instruction"),
        ("wrong column type", "error", [18], "images are bytes or paths"),
        ("the target is one of the references", "error", [6], "the target comes last"),
        ("the same reference twice", "warning", [8], "remove the copy"),
        ("times as long as wide", "warning", [17], "crop"),
        ("copies of another row", "warning", [0, 5], "remove them"),
        ("looks like another row's", "note", [15, 16], "keep the better one"),
    ],
)
def test_each_fault_is_found_named_and_has_a_fix(
    report: DataReport, match: str, level: str, rows: list[int], fix: str
) -> None:
    if "looks like" in match:
        pytest.importorskip("imagehash")
    found = [f for f in report.findings if match.removesuffix(": ") in f.what]
    assert len(found) == 1, [f.what for f in report.findings]
    assert found[0].level == level and fix in found[0].fix
    places = " ".join(found[0].where)
    assert {int(number) for number in re.findall(r"rows\.jsonl:(\d+)", places)} >= set(rows)


def test_counts_of_a_file(report: DataReport) -> None:
    (file,) = report.files
    assert file.rows == report.rows == 19 and file.usable == report.usable == 11 and report.complete
    assert file.references == {1: 9, 2: 2} and file.longest_side_ratio == pytest.approx(400 / 60)
    assert file.sizes[0] == (64, 64) and report.has_errors
    text = report_text(report)
    assert "19 rows looked at (every row, pictures decoded), 11 usable" in text and "→ crop these images" in text
    assert json.loads(report_json(report))["has_errors"] is True


def test_processes_make_no_difference_and_headers_alone_tell_less(faulty: Opened, report: DataReport) -> None:
    assert [f.what for f in validate(faulty, workers=1).findings] == [f.what for f in report.findings]
    headers = validate(faulty, decode=False)
    assert headers.usable == report.usable + 1  # only decoding sees the truncated picture


def test_rows_that_are_too_long_and_the_setting_that_keeps_them(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    settings_ = {"max_num_tokens": 300, "max_num_tokens_per_sample": 150, "expected_num_tokens": 200}
    settings_ |= {"prefer_buffer_before": 100, "dataset_config_file": str(EXAMPLES / "dataset.yaml")}
    settings_ |= {"init_from": str(EXAMPLES / "tiny_bagel")}
    run.write_text(json.dumps(settings_))
    opened = open_data(run)
    assert not opened.counts_words and opened.max_num_tokens_per_sample == 150
    (finding,) = [f for f in validate(opened, decode=False).findings if "longer than 150 tokens" in f.what]
    need = int(re.findall(r"--max_num_tokens_per_sample (\d+)", finding.fix)[0])
    settings_ |= {"max_num_tokens_per_sample": need, "max_num_tokens": max(need, 300)}
    run.write_text(json.dumps(settings_))
    assert not [f for f in validate(open_data(run), decode=False).findings if "longer than" in f.what]
    settings_ |= {"max_num_tokens_per_sample": need - 1}
    run.write_text(json.dumps(settings_))
    assert [f.count for f in validate(open_data(run), decode=False).findings if "longer than" in f.what] >= [1]


def test_a_sample_looks_at_as_many_rows_as_asked(faulty: Opened) -> None:
    opened = open_data(EXAMPLES / "dataset.yaml")
    found = validate(opened, sample=40, decode=False)
    assert 40 <= found.rows <= 48 and not found.complete


def test_data_sets_as_they_lie_are_opened_by_their_format() -> None:
    opened = open_data(EXAMPLES / "multi_ref_native" / "train.jsonl")
    assert [group.name for group in opened.groups] == ["multi_ref"] and len(opened.groups[0].source) == 40
    with pytest.raises(DataError, match="does not exist"):
        open_data(EXAMPLES / "nowhere")


@pytest.mark.parametrize("name", MINIATURES)
def test_every_published_format_is_recognised_checked_and_shown(name: str, tmp_path: Path) -> None:
    opened = open_data(write(name, tmp_path / "data"))
    report = validate(opened)
    assert report.rows == report.usable == sum(len(group.source) for group in opened.groups) > 0
    assert not report.has_errors
    page = write_page(opened, tmp_path / "page.html", rows=1, layouts=False).read_text()
    assert page.count("<article") == len(opened.groups)
    if name == "blip3o":
        assert "lack an image or a text" in report_text(report)  # what opening found


# ---------------------------------------------------------------- duplicates


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.randoms(use_true_random=False))
def test_near_hashes_are_those_of_a_comparison_of_all_pairs(values: list[int], rng: random.Random) -> None:
    values += [value ^ (1 << rng.randrange(64)) ^ (1 << rng.randrange(64)) for value in values[:10]]
    values = [value for value in values if 4 <= value.bit_count() <= 60]
    hashes = [(value, str(place)) for place, value in enumerate(values)]
    joined = {frozenset(group) for group in near_groups(hashes)}
    leader = list(range(len(values)))
    for one in range(len(values)):
        for other in range(one):
            if (values[one] ^ values[other]).bit_count() <= 4:
                old, new = leader[one], leader[other]
                leader = [new if entry == old else entry for entry in leader]
    wanted = {frozenset(str(p) for p, entry in enumerate(leader) if entry == name) for name in set(leader)}
    assert joined == {group for group in wanted if len(group) > 1}


# ---------------------------------------------------------------- stats


def test_counts_are_those_of_the_packs_that_training_gets() -> None:
    opened = open_data(ROOT / "configs" / "tiny_cpu.yaml")
    stats = mixture_stats(opened, steps=6)
    layout = StreamLayout(1, 4, 1, 0)
    run = opened.run
    assert run is not None
    streams = RankStreams(opened.groups, opened.packer, opened.limits, run.data.data_seed, 1.0, layout, {}, 0)
    batches = [delivery.batch for _, delivery in zip(range(6), streams, strict=False)]
    lengths = [batch.sequence_length for batch in batches if batch is not None]
    assert stats.tokens == sum(lengths) and stats.packs == 6
    assert stats.samples == sum(len(batch.sample_names) for batch in batches if batch is not None)
    vae = sum(
        len(b.packed_vae_token_indexes) for b in batches if b is not None and b.packed_vae_token_indexes is not None
    )
    images = sum(len(b.vae_seeds or ()) for b in batches if b is not None)
    assert stats.tokens_by_kind["vae_image"] == vae + 2 * images
    assert "6 steps, 6 packs" in stats_text(stats, opened)
    assert json.loads(stats_json(stats))["groups"]["multi_ref"]["samples"] == stats.samples


def test_shares_of_a_mixture_and_ranks() -> None:
    opened = open_data(EXAMPLES / "dataset_mixed.yaml")
    stats = mixture_stats(opened, steps=1, ranks=2)
    assert stats.packs == 2 and set(stats.groups) == {"multi_ref", "t2i_pretrain", "unified_edit", "vlm_sft"}
    assert stats.groups["multi_ref"].samples > stats.groups["t2i_pretrain"].samples
    assert stats.groups["t2i_pretrain"].references == 0 < stats.groups["multi_ref"].references
    assert "pass --tokenizer FOLDER" in stats_text(stats, opened)
    with pytest.raises(DataError, match="must be at least 1"):
        mixture_stats(opened, steps=0)


# ---------------------------------------------------------------- page


def test_the_page_is_self_contained_and_shows_what_the_model_sees(faulty: Opened, tmp_path: Path) -> None:
    page = write_page(faulty, tmp_path / "page.html", rows=19, layouts=False).read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "VAE 64 × 64, 18 tokens" in page and "reference 2" in page and "target" in page
    assert "image truncated" in page and "invalid json" in page
    # Every picture is inside, and can be decoded.
    import base64

    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    assert len(found) == 11 * 2 + 2  # a reference and a target each; two rows have two references
    assert all(Image.open(io.BytesIO(base64.b64decode(data))).size[0] >= 64 for data in found)


def test_text_on_the_page_is_text(tmp_path: Path) -> None:
    rows = [row("<script>alert(1)</script> & <b>", ["0.png"], "1.png")]
    config = write_rows(tmp_path, rows, {"0.png": picture(0), "1.png": picture(1)})
    page = write_page(open_data(config, tokenizer=EXAMPLES / "tiny_bagel"), tmp_path / "p.html", rows=1).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "how it is packed" in page
    with pytest.raises(DataError, match="ends in .html"):
        write_page(open_data(config), tmp_path / "page.txt")
