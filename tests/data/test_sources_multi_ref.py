"""Multi-reference rows: upstream's parquet, native JSONL, and the options beyond upstream."""

import base64
import json
import logging
import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.base import Address, item_seed
from echo4o.data.sources.references import names_beyond, renumber, split_inline, surely_renumbered
from tests.data.rows_on_disk import (
    all_plans,
    build_group,
    count_tokens,
    encoded,
    shape_of,
    write_jsonl,
    write_parquet,
)


def multi_ref(tmp_path, rows, *, settings=None, schema=None, row_group_size=None, **changes):
    write_parquet(tmp_path / "rows" / "a.parquet", rows, row_group_size, schema)
    return build_group(tmp_path, "multi_ref", {"data_dir": "rows"}, settings=settings, **changes).source


def row_of(num_references, instruction="mix them", **columns):
    images = [encoded(40, 30, value=10 * (place + 1)) for place in range(num_references)]
    return {"image_list": [*images, encoded(50, 40, value=200)], "instruction_list": [[instruction]], **columns}


def text_of(source, position=0):
    sample = source.plan(0, position).load()
    return next(content for kind, content, *_ in shape_of(sample) if kind == "text")


def test_the_plan_is_upstreams(tmp_path):
    source = multi_ref(tmp_path, [row_of(2)])
    plan = source.plan(0, 0)
    sample = plan.load()
    assert shape_of(sample) == [
        ("vae_image", 10, False, True),
        ("vit_image", 10, False, True),
        ("vae_image", 20, False, True),
        ("vit_image", 20, False, True),
        ("text", "mix them", False, True),
        ("vae_image", 200, True, False),
    ]
    assert plan.num_tokens == count_tokens(sample)
    laid_out = [(segment.kind, segment.droppable) for segment in plan.segments]
    assert laid_out == [(segment.kind, segment.droppable) for segment in sample.segments]
    assert sum(segment.num_tokens for segment in plan.segments) == plan.num_tokens
    assert (plan.name, plan.row) == ("data", f"{tmp_path}/rows/a.parquet:0") == (sample.name, sample.row)
    assert plan.seed == sample.seed == item_seed(42, 0, "multi_ref", 0)


def test_ten_references_keep_their_order(tmp_path):
    sample = multi_ref(tmp_path, [row_of(10)]).plan(0, 0).load()
    assert [c for kind, c, *_ in shape_of(sample) if kind == "vae_image"] == [*range(10, 101, 10), 200]


def test_without_understanding_branch_no_vit_image_is_laid_down(tmp_path):
    plan = multi_ref(tmp_path, [row_of(2)], visual_und=False).plan(0, 0)
    sample = plan.load()
    assert "vit_image" not in [segment.kind for segment in sample.segments]
    assert plan.num_tokens == count_tokens(sample)


NESTINGS = [
    ("plain", pa.string(), {"plain"}),
    (["first", "second"], pa.list_(pa.string()), {"first"}),
    ([["only"]], pa.list_(pa.list_(pa.string())), {"only"}),
    ([["this way", "that way"], ["ignored"]], pa.list_(pa.list_(pa.string())), {"this way", "that way"}),
]


@pytest.mark.parametrize("value, kind, expected", NESTINGS)
def test_every_nesting_of_instructions(tmp_path, value, kind, expected):
    rows = [{"image_list": row_of(1)["image_list"], "instruction_list": value}] * 12
    schema = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", kind)])
    source = multi_ref(tmp_path, rows, schema=schema)
    assert {text_of(source, position) for position in range(12)} == expected


# --- native JSONL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["input_images", "input_image", "image_list", "images"])
@pytest.mark.parametrize("output, instruction", [("output_image", "instruction"), ("target_image", "prompt")])
def test_native_jsonl_with_paths_and_aliases(tmp_path, inputs, output, instruction):
    for name, value in [("a.png", 10), ("b.png", 20), ("t.png", 200)]:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encoded(value=value))
    row = {inputs: ["images/a.png", "images/b.png"], output: "images/t.png", instruction: "mix"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    source = build_group(tmp_path, "multi_ref", {"jsonl_path": "rows.jsonl"}).source
    assert [content for _, content, *_ in shape_of(source.plan(0, 0).load())] == [10, 10, 20, 20, "mix", 200]


def test_paths_start_at_data_dir_and_may_look_absolute(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(value=10))
    (tmp_path / "pictures" / "t.png").write_bytes(encoded(value=200))
    row = {"instruction": "x", "input_images": "a.png", "output_image": "/t.png"}
    write_jsonl(tmp_path / "rows" / "rows.jsonl", [row])
    entry = {"jsonl_path": "rows/rows.jsonl", "data_dir": "pictures"}
    source = build_group(tmp_path, "multi_ref", entry).source
    assert [content for _, content, *_ in shape_of(source.plan(0, 0).load())] == [10, 10, "x", 200]


def test_native_jsonl_with_embedded_bytes(tmp_path):
    text = [base64.b64encode(encoded(value=value)).decode() for value in (10, 20, 200)]
    row = {
        "instruction": "mix",
        "input_images": [text[0], {"bytes": text[1], "path": None}],
        "output_image": f"data:image/png;base64,{text[2]}",
    }
    write_jsonl(tmp_path / "rows.jsonl", [row])
    source = build_group(tmp_path, "multi_ref", {"jsonl_path": "rows.jsonl"}).source
    assert [content for _, content, *_ in shape_of(source.plan(0, 0).load())] == [10, 10, 20, 20, "mix", 200]


# --- options ------------------------------------------------------------------------------------------------------


def test_pixels_by_number_of_references(tmp_path):
    images = [encoded(96, 96, value=10)] * 3
    rows = [{"image_list": [*images[:n], encoded(96, 96)], "instruction_list": [["x"]]} for n in (1, 2, 3)]
    source = multi_ref(tmp_path, rows, settings={"max_pixels_by_num_refs": [96 * 96, 4096]})
    sides = []
    for plan in all_plans(source):
        sample = plan.load()
        assert plan.num_tokens == count_tokens(sample)
        sides.append([segment.image.shape[1] for segment in sample.segments if segment.image is not None])
    assert sides == [[96, 84, 96], [64, 56] * 2 + [96], [64, 56] * 3 + [96]]


def test_max_refs_skips_and_counts_or_truncates(tmp_path):
    skipping = multi_ref(tmp_path, [row_of(3)], settings={"max_refs": 2})
    with pytest.raises(RowError, match="3 references; max_refs is 2") as caught:
        skipping.plan(0, 0)
    assert caught.value.reason == "too many references" and caught.value.row == 0
    cutting = multi_ref(tmp_path, [row_of(3)], settings={"max_refs": 2, "max_refs_policy": "truncate"})
    contents = [content for _, content, *_ in shape_of(cutting.plan(0, 0).load())]
    assert contents == [10, 10, 20, 20, "mix them", 200]


def test_noise_copies_share_one_tensor(tmp_path):
    plan = multi_ref(tmp_path, [row_of(1)], settings={"noise_copies": 3}).plan(0, 0)
    sample = plan.load()
    targets = [segment for segment in sample.segments if segment.loss]
    assert len(targets) == 3 and all(target.image is targets[0].image for target in targets)
    assert plan.num_tokens == count_tokens(sample)


def test_inline_references_stand_where_they_are_named(tmp_path):
    rows = [row_of(3, "Put <image 2> beside <image 1>, as in <image 2>.")]
    source = multi_ref(tmp_path, rows, settings={"inline_references": True})
    plan = source.plan(0, 0)
    sample = plan.load()
    contents = [content for kind, content, *_ in shape_of(sample) if kind != "vit_image"]
    assert contents == [30, "Put", 20, "beside", 10, ", as in <image 2>.", 200]
    assert plan.num_tokens == count_tokens(sample)


def test_shuffled_references_keep_the_meaning_of_the_instruction(tmp_path):
    rows = [row_of(3, "image 1, image 2 and image 3")] * 30
    source = multi_ref(tmp_path, rows, settings={"shuffle_references": True})
    orders = set()
    for position in range(30):
        shape = shape_of(source.plan(0, position).load())
        brightness = [content for kind, content, *_ in shape if kind == "vit_image"]
        text = next(content for kind, content, *_ in shape if kind == "text")
        named = [int(word.strip(",")) for word in text.split() if word.strip(",").isdigit()]
        assert [brightness[number - 1] for number in named] == [10, 20, 30]
        orders.add(tuple(brightness))
    assert len(orders) == 6


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the cat of image 1 on the sofa of Image 3", "the cat of image 2 on the sofa of Image 1"),
        ("<image 1> and <image> then <image>", "<image 2> and <image 2> then <image 3>"),
        ("images 1, 2 and 3", "images 2, 3 and 1"),
        (
            "The First image and the third picture; the last photo",
            "The Second image and the first picture; the first photo",
        ),
        ("the 2nd image, reference image 1, reference #2", "the third image, reference image 2, reference #3"),
        ("image1 与图3", "image2 与图1"),
        ("at 512 px, 3 apples, image 4, first of all", "at 512 px, 3 apples, image 4, first of all"),
    ],
)
def test_renumber(text, expected):
    assert renumber(text, [2, 3, 1]) == expected


@given(st.permutations([1, 2, 3, 4]), st.lists(st.integers(1, 4), max_size=6))
def test_renumbering_back_gives_the_same_text(new_numbers, mentions):
    text = "use " + " with ".join(f"image {number} and <image {number}>" for number in mentions)
    back = [new_numbers.index(number) + 1 for number in (1, 2, 3, 4)]
    assert renumber(renumber(text, new_numbers), back) == text


@given(st.integers(0, 6), st.lists(st.sampled_from(["<image>", "a", "<image 1>", " b "]), max_size=6))
def test_inline_lays_every_reference_down_once(num_references, pieces):
    try:
        parts = split_inline("".join(pieces), num_references)
    except RowError as error:
        assert error.reason == "placeholder without image"
        return
    assert sorted(part for part in parts if isinstance(part, int)) == list(range(num_references))


@pytest.mark.parametrize(
    "text",
    [
        "the cat of the first image and the dog of the second one",
        "the cat from image 1 and the hat from 2",
        "the second-to-last image",
        "the first and second images",
        "Use the 1st and 2nd images",
        "image one and image two",
        "image A and image B",
        "subject 1 beside subject 2",
        "the first two images",
        "images 1-2",
        "put A on B",
        "B's hat on the dog of image 1",
        "the sofa of image 1 with the latter",
        "both cats, respectively",
        "the next image",
        "图一和图二",
        "第一张图",
        "image 3",
    ],
)
def test_doubtful_instructions_are_not_renumbered(text):
    assert surely_renumbered(text, [2, 1]) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the cat of image 1 on the sofa of image 2", "the cat of image 2 on the sofa of image 1"),
        ("A cat like in <image> and <image>", "A cat like in <image 2> and <image 1>"),
        ("images 1 and 2 into one image, 512 px, 4K, 3D", "images 2 and 1 into one image, 512 px, 4K, 3D"),
        (
            "I want the last image in the style of the first image",
            "I want the first image in the style of the second image",
        ),
        ("the cat beside the sofa", "the cat beside the sofa"),
        ("图1和图2", "图2和图1"),
    ],
)
def test_instructions_that_are_surely_understood(text, expected):
    assert surely_renumbered(text, [2, 1]) == expected


def test_shuffling_keeps_the_given_order_where_the_instruction_is_doubtful(tmp_path, caplog):
    text = "the cat of the first image and the dog of the second one"
    source = multi_ref(tmp_path, [row_of(2, text)] * 12, settings={"shuffle_references": True})
    with caplog.at_level(logging.DEBUG, "echo4o"):
        shapes = [shape_of(source.plan(0, position).load()) for position in range(12)]
    assert {tuple(content for _, content, *_ in shape) for shape in shapes} == {(10, 10, 20, 20, text, 200)}
    assert "given order kept" in caplog.text


@pytest.mark.parametrize(
    "text, beyond",
    [
        ("image 1 and image 2", True),
        ("images 1 and 2", True),
        ("<image> and <image>", True),
        ("the last image", True),
        ("the second one", True),
        ("the other image", True),
        ("图二", True),
        ("image 1 at 512 px", False),
        ("the first image as one picture", False),
        ("mix them", False),
    ],
)
def test_truncation_refuses_instructions_that_name_a_removed_reference(tmp_path, text, beyond):
    assert names_beyond(text, 1, 2) is beyond
    settings = {"max_refs": 1, "max_refs_policy": "truncate"}
    source = multi_ref(tmp_path, [row_of(2, text)], settings=settings)
    if not beyond:
        assert [c for kind, c, *_ in shape_of(source.plan(0, 0).load()) if kind == "vae_image"] == [10, 200]
        return
    with pytest.raises(RowError) as caught:
        source.plan(0, 0)
    assert caught.value.reason == "instruction names a removed reference"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("text", ["<image 3> on <image 1>", "<image> <image> <image>", "<image 0>"])
def test_inline_placeholders_beyond_the_references_are_bad_rows(tmp_path, text, shuffle):
    settings = {"inline_references": True, "shuffle_references": shuffle}
    with pytest.raises(RowError) as caught:
        multi_ref(tmp_path, [row_of(2, text)], settings=settings).plan(0, 0)
    assert caught.value.reason == "placeholder without image"


def test_pixel_budgets_as_a_mapping(tmp_path):
    images = [encoded(96, 96, value=10)] * 5
    rows = [{"image_list": [*images[:n], encoded(96, 96)], "instruction_list": [["x"]]} for n in (1, 2, 3, 4, 5)]
    source = multi_ref(tmp_path, rows, settings={"max_pixels_by_num_refs": {4: 1024, 2: 4096}})
    first_sides = [plan.load().segments[0].image.shape[1] for plan in all_plans(source)]
    assert first_sides == [64, 64, 64, 32, 32]


# --- order, identity, bad rows --------------------------------------------------------------------------------------


def test_a_row_is_the_same_whenever_and_wherever_it_is_planned(tmp_path):
    rows = [row_of(2, f"row {number}") for number in range(20)]
    source = multi_ref(tmp_path, rows, row_group_size=4, settings={"shuffle_references": True})
    plans = [source.plan(1, position) for position in range(20)]
    assert sorted(plan.address.index for plan in plans) == list(range(20))
    elsewhere = pickle.loads(pickle.dumps(source))
    for plan in reversed(plans):
        again = elsewhere.locate(Address(*plan.address))
        assert (again.seed, again.num_tokens, again.row) == (plan.seed, plan.num_tokens, plan.row)
        assert shape_of(again.load()) == shape_of(plan.load())
    other_epoch = [source.plan(2, position).seed for position in range(20)]
    assert not set(other_epoch) & {plan.seed for plan in plans}


GOOD = row_of(1)["image_list"]
BAD_ROWS = [
    ({"image_list": [], "instruction_list": "x"}, "no images"),
    ({"image_list": None, "instruction_list": "x"}, "no images"),
    ({"image_list": GOOD, "instruction_list": ""}, "instruction missing"),
    ({"image_list": GOOD, "instruction_list": None}, "instruction missing"),
    ({"image_list": [b"", GOOD[0]], "instruction_list": "x"}, "image empty"),
    ({"image_list": [None, GOOD[0]], "instruction_list": "x"}, "image missing"),
    ({"image_list": [b"garbage", GOOD[0]], "instruction_list": "x"}, "image unreadable"),
]


@pytest.mark.parametrize("row, reason", BAD_ROWS)
def test_bad_rows_say_what_and_where(tmp_path, row, reason):
    schema = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", pa.string())])
    source = multi_ref(tmp_path, [{"image_list": GOOD, "instruction_list": "x"}, row], schema=schema)
    with pytest.raises(RowError) as caught:
        source.locate(Address("multi_ref", 0, 1))
    assert (caught.value.reason, caught.value.where) == (reason, f"{tmp_path}/rows/a.parquet:1")
    assert caught.value.where in str(pickle.loads(pickle.dumps(caught.value)))
    source.locate(Address("multi_ref", 0, 0)).load()


def jsonl_source(tmp_path, lines, **settings):
    for name, value in [("a.png", 10), ("c.png", 200)]:
        (tmp_path / name).write_bytes(encoded(value=value))
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return build_group(tmp_path, "multi_ref", {"jsonl_path": "rows.jsonl"}, settings=settings).source


def native_row(**columns):
    return {"instruction": "x", "input_images": ["a.png"], "output_image": "c.png", **columns}


def reason_of(source):
    with pytest.raises(RowError) as caught:
        source.plan(0, 0)
    assert caught.value.where.endswith(("rows.jsonl:0", "a.parquet:0"))
    str(caught.value).encode()  # every log can take it
    return caught.value.reason


@pytest.mark.parametrize(
    "line, reason",
    [
        (native_row(input_images=["é" * 60]), "image missing"),
        (native_row(input_images=["é" * 200]), "image missing"),
        (native_row(input_images=["d" * 301]), "image missing"),
        (native_row(input_images=["data:image/png;base64,é"]), "image unreadable"),
        (native_row(input_images=["a\x00b.png"]), "image unreadable"),
        (native_row(input_images=["\ud800.png"]), "image unreadable"),
        ('{"instruction": ' + "[" * 100_000, "invalid json"),
        (native_row(input_images=json.loads("[" * 500 + "]" * 500)), "wrong column type"),
    ],
)
def test_odd_rows_are_counted_instead_of_ending_the_run(tmp_path, line, reason):
    assert reason_of(jsonl_source(tmp_path, [line])) == reason


def test_an_instruction_that_no_tokenizer_takes_is_a_bad_row(tmp_path, monkeypatch):
    def encode(self, text):
        text.encode()  # fails on lone surrogates, as tokenizers written in Rust do
        return [0]

    monkeypatch.setattr("tests.data.rows_on_disk.CharTokenizer.encode", encode)
    source = jsonl_source(tmp_path, [native_row(instruction="a \ud800 b")])
    assert reason_of(source) == "row unreadable"


def test_unforeseen_errors_while_decoding_are_bad_rows_but_data_errors_stop(tmp_path, monkeypatch):
    plan = jsonl_source(tmp_path, [native_row()]).plan(0, 0)
    outcomes = []
    for error in (IndexError("odd"), DataError("stop")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("echo4o.data.sources.drafts.open_image", fail)
        with pytest.raises((RowError, DataError)) as caught:
            plan.load()
        outcomes.append(str(caught.value))
    assert outcomes == [f"{tmp_path}/rows.jsonl:0: row unreadable: IndexError: odd", "stop"]


def test_a_path_that_is_also_base64_is_a_path_where_the_file_exists(tmp_path):
    name = "images/" + "a" * 57
    (tmp_path / "images").mkdir()
    (tmp_path / name).write_bytes(encoded(value=30))
    assert len(base64.b64decode(name, validate=True)) == 48
    sample = jsonl_source(tmp_path, [native_row(input_images=[name])]).plan(0, 0).load()
    assert shape_of(sample)[0][1] == 30


# --- rows without references --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns", [{"input_images": []}, {"input_images": None}, {"input_images": None, "reference_images": ["a.png"]}]
)
def test_a_row_without_references_is_bad(tmp_path, columns):
    source = jsonl_source(tmp_path, [native_row(**columns)])
    assert reason_of(source) == "no references"
    with pytest.raises(RowError, match="columns with values: instruction, .*output_image"):
        source.plan(0, 0)


def test_rows_without_references_are_an_option_but_misnamed_references_are_not(tmp_path):
    target_only = {"image_list": [encoded(value=200)], "instruction_list": [["x"]]}
    assert reason_of(multi_ref(tmp_path, [target_only])) == "no references"
    allowed = multi_ref(tmp_path, [target_only], settings={"allow_no_references": True})
    assert shape_of(allowed.plan(0, 0).load()) == [("text", "x", False, True), ("vae_image", 200, True, False)]
    empty = jsonl_source(tmp_path, [native_row(input_images=[])], allow_no_references=True)
    assert [content for _, content, *_ in shape_of(empty.plan(0, 0).load())] == ["x", 200]
    misnamed = {"instruction": "x", "reference_images": ["a.png"], "output_image": "c.png"}
    assert reason_of(jsonl_source(tmp_path, [misnamed], allow_no_references=True)) == "no references"


def test_the_target_may_be_a_list_of_one(tmp_path):
    sample = jsonl_source(tmp_path, [native_row(output_image=["c.png"])]).plan(0, 0).load()
    assert [content for _, content, *_ in shape_of(sample)] == [10, 10, "x", 200]
    for images in ([], ["c.png", "a.png"]):
        source = jsonl_source(tmp_path, [native_row(output_image=images)])
        with pytest.raises(RowError, match=f"output_image holds {len(images)} images; a row has one target"):
            source.plan(0, 0)


def test_wrong_column_types_and_missing_columns(tmp_path):
    for columns, reason in [
        ({"image_list": [1, 2], "instruction_list": "x"}, "wrong column type"),
        ({"image_list": GOOD, "instruction_list": 5}, "wrong column type"),
        ({"unrelated": 1}, "no images"),
    ]:
        with pytest.raises(RowError) as caught:
            multi_ref(tmp_path, [columns]).plan(0, 0)
        assert caught.value.reason == reason


def test_a_truncated_image_is_planned_but_fails_to_load(tmp_path):
    broken = encoded(200, 200, format="JPEG", quality=100)
    row = {"image_list": [broken[: len(broken) // 2], GOOD[0]], "instruction_list": [["x"]]}
    plan = multi_ref(tmp_path, [row]).plan(0, 0)
    with pytest.raises(RowError) as caught:
        plan.load()
    assert (caught.value.reason, caught.value.where) == ("image truncated", f"{tmp_path}/rows/a.parquet:0")


def test_a_grid_beyond_the_position_table_is_a_bad_row(tmp_path):
    small = {"max_latent_size": 2}
    with pytest.raises(RowError) as caught:
        multi_ref(tmp_path, [row_of(1)], limits=small).plan(0, 0)
    assert caught.value.reason == "grid too large"
    assert multi_ref(tmp_path, [row_of(1)], limits={**small, "interpolate_pos": True}).plan(0, 0).load()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_ref": 3}, "did you mean 'max_refs'"),
        ({"max_refs_policy": "drop"}, "skip, truncate"),
        ({"noise_copies": 0}, "at least 1"),
        ({"vae_on_references": False, "vit_on_references": False}, "invisible"),
        ({"max_pixels_by_num_refs": [0]}, "positive"),
        ({"max_pixels_by_num_refs": {1: 4096.0}}, "positive whole numbers"),
        ({"max_pixels_by_num_refs": {"1": 4096}}, "positive whole numbers"),
        ({"max_pixels_by_num_refs": {1: True}}, "positive whole numbers"),
        ({"max_pixels_by_num_refs": 4096}, "a list or a mapping"),
        ({"max_pixels_by_num_refs": {1: 4096, 2: 255}}, "below one patch of the image transforms, 256 pixels"),
        ({"image_transform_args": {"image_stride": 24, "max_image_size": 96, "min_image_size": 24}}, "multiple of 16"),
        ({"image_transform_args": {"image_strid": 16, "max_image_size": 96, "min_image_size": 24}}, "'image_stride'"),
    ],
)
def test_wrong_settings_name_the_fix(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        multi_ref(tmp_path, [row_of(1)], settings=settings)
