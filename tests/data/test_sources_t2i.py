"""Text-to-image rows."""

import json

import pytest

from echo4o.data.errors import RowError
from tests.data.rows_on_disk import all_plans, build_group, count_tokens, encoded, shape_of, write_jsonl, write_parquet


def t2i(tmp_path, rows):
    write_parquet(tmp_path / "rows" / "a.parquet", rows)
    return build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}).source


def test_a_caption_is_drawn_from_the_json_object(tmp_path):
    captions = json.dumps({"short": "a dog", "long": "a big dog"})
    source = t2i(tmp_path, [{"image": encoded(value=50), "captions": captions}] * 12)
    shapes = set()
    for plan in all_plans(source):
        sample = plan.load()
        assert plan.num_tokens == count_tokens(sample)
        shapes.add(tuple(shape_of(sample)))
    image = ("vae_image", 50, True, False)
    assert shapes == {(("text", caption, False, True), image) for caption in ("a dog", "a big dog")}


@pytest.mark.parametrize(
    "columns, caption",
    [
        ({"captions": "{}"}, " "),
        ({"captions": '["one"]'}, "one"),
        ({"caption": "plain"}, "plain"),
        ({"text": "plain"}, "plain"),
    ],
)
def test_other_captions(tmp_path, columns, caption):
    sample = t2i(tmp_path, [{"image": encoded(), **columns}]).plan(0, 0).load()
    assert shape_of(sample)[0][1] == caption


def test_a_hugging_face_image_column(tmp_path):
    row = {"image": {"bytes": encoded(value=70), "path": None}, "caption": "x"}
    assert shape_of(t2i(tmp_path, [row]).plan(0, 0).load())[1][1] == 70


def test_native_jsonl(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(value=90, format="JPEG"))
    write_jsonl(tmp_path / "r.jsonl", [{"task_type": "t2i", "instruction": "a cat", "output_image": "/a.jpg"}])
    source = build_group(tmp_path, "t2i_pretrain", {"jsonl_path": "r.jsonl"}).source
    assert [content for _, content, *_ in shape_of(source.plan(0, 0).load())] == ["a cat", 90]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"image": encoded(), "captions": "not json"}, "invalid json"),
        ({"image": encoded(), "captions": "3"}, "wrong column type"),
        ({"image": encoded(), "other": 1}, "instruction missing"),
        ({"captions": "{}"}, "no images"),
        ({"image": "absent.png", "captions": "{}"}, "image missing"),
    ],
)
def test_bad_rows(tmp_path, row, reason):
    with pytest.raises(RowError) as caught:
        t2i(tmp_path, [row]).plan(0, 0)
    assert caught.value.reason == reason
