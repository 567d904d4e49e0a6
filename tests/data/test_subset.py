"""Splits and max_rows: sides never overlap, choices are random, and appended rows reshuffle nothing."""

import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.errors import DataError
from echo4o.data.formats.record import Record, StoredImage
from echo4o.data.sources import build_sources
from echo4o.data.sources.jsonl import JsonlRows
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.row_identity import content_keys, place_keys, uniform
from echo4o.data.sources.rows import DataSet
from echo4o.data.sources.subset import Subset, SubsetRows
from echo4o.data.sources.t2i import T2IPlanner
from tests.data.rows_on_disk import VAE, all_plans, build_group, context, encoded, write_jsonl, write_parquet

COLUMNS = T2IPlanner.columns


class TextRows:
    """Rows in memory: texts (or none) in units, as the lines of a file."""

    def __init__(self, texts, unit=7, file="rows"):
        self.texts, self.file, self.files = list(texts), file, [file]
        self.unit_lengths = [len(self.texts[start : start + unit]) for start in range(0, len(self.texts), unit)]

    def __len__(self):
        return len(self.texts)

    def read(self, row):
        return {"captions": self.texts[row], "image": b"bytes do not count", "idx": row}

    def where(self, row):
        return self.file, row

    def folder(self, row):
        raise NotImplementedError

    def expect_streams(self, num_streams):
        """In memory."""


def chosen(stores, num_data_sets=None, **keys):
    """Rows of each store that a group with these keys uses."""
    data_sets = [DataSet(f"d{number}", store) for number, store in enumerate(stores)]
    subset = Subset.read("g", keys, num_data_sets or len(data_sets))
    return [[part.store.read(row)["idx"] for row in range(len(part.store))] for part in subset.of(data_sets, COLUMNS)]


TEXTS = st.lists(st.sampled_from([*"abcdefghijklmnop", None]), min_size=30, max_size=200)
SPLITS = st.fixed_dictionaries(
    {"validation": st.floats(0.05, 0.9), "by": st.sampled_from(["content", "row"]), "seed": st.integers(0, 9)}
)


def sides(stores, **keys):
    """Rows for training and for validation; none where a side would be empty."""
    found = []
    for side in ("train", "validation"):
        try:
            found.append(chosen(stores, use_split=side, **keys))
        except DataError:
            found.append([[] for _ in stores])
    return found


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, SPLITS)
def test_sides_of_a_split_share_no_row_and_lose_none(one, other, split):
    stores = [TextRows(one), TextRows(other, file="more")]
    train, validation = sides(stores, split=split)
    for number, store in enumerate(stores):
        assert sorted(train[number] + validation[number]) == list(range(len(store)))
    if split["by"] == "content":
        texts = [
            {store.texts[row] for store, rows in zip(stores, side, strict=True) for row in rows} - {None}
            for side in (train, validation)
        ]
        assert not texts[0] & texts[1]


def test_rows_that_cannot_be_read_stay_to_be_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text("no json\n" * 50)
    store = JsonlRows([tmp_path / "rows.jsonl"])
    assert np.array_equal(content_keys("d", store, COLUMNS), place_keys("d", store))


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 200), st.integers(1, 60), st.integers(1, 80), SPLITS, st.integers(0, 5))
def test_appended_rows_move_no_other(num_rows, max_rows, num_more, split, seed):
    before, after = [TextRows(map(str, range(n))) for n in (num_rows, num_rows + num_more)]
    ((first,), (then,)) = [chosen([store], max_rows=max_rows, subset_seed=seed) for store in (before, after)]
    assert len(first) == len(then) == max_rows
    assert {row for row in then if row < num_rows} <= set(first)
    for old, new in zip(sides([before], split=split), sides([after], split=split), strict=True):
        assert [row for row in new[0] if row < num_rows] == old[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["content", "row"]))
def test_shares_of_a_split_and_choices_are_random(seed, by):
    store = TextRows(map(str, range(4000)), unit=64)
    (validation,) = chosen([store], split={"validation": 0.1, "by": by, "seed": seed}, use_split="validation")
    assert len(validation) == pytest.approx(400, abs=100)
    (some,) = chosen([store], max_rows=1000, subset_seed=seed)
    assert np.mean(some) == pytest.approx(2000, abs=200)


def test_one_number_is_for_the_group_a_list_for_its_data_sets(caplog):
    stores = [TextRows(map(str, range(300))), TextRows(map(str, range(100)), file="b")]
    with caplog.at_level(logging.INFO):
        both = chosen(stores, max_rows=80)
    assert "g: max_rows uses 80 of 400 rows" in caplog.text
    assert sum(map(len, both)) == 80 and len(both[0]) == pytest.approx(60, abs=15)
    assert list(map(len, chosen(stores, max_rows=[None, 10]))) == [300, 10]
    assert list(map(len, chosen(stores, max_rows=1000))) == [300, 100]


def test_max_rows_counts_what_the_split_leaves():
    store = TextRows(map(str, range(400)))
    keys = {"split": {"validation": 0.5}, "max_rows": 50}
    train, validation = sides([store], **keys)
    assert len(train[0]) == len(validation[0]) == 50 and not set(train[0]) & set(validation[0])


def test_a_split_does_not_depend_on_the_folder_and_place_keys_are_the_same_row_by_row(tmp_path):
    for folder in ("here", "there"):
        write_jsonl(tmp_path / folder / "rows.jsonl", [{"captions": str(n)} for n in range(200)])
    here, there = (JsonlRows([tmp_path / folder / "rows.jsonl"]) for folder in ("here", "there"))
    assert np.array_equal(place_keys("d", here), place_keys("d", there))
    some = JsonlRows([tmp_path / "here" / "rows.jsonl"], 90, shuffle_seed=3)
    lines = [some.where(row)[1] for row in range(90)]
    assert np.array_equal(place_keys("d", some), place_keys("d", here)[lines])
    repeated = JsonlRows([tmp_path / "here" / "rows.jsonl"], 500)
    assert np.array_equal(place_keys("d", repeated), place_keys("d", here)[np.arange(500) % 200])
    assert len(set(place_keys("d", here)) | set(place_keys("e", here))) == 400


def test_other_purposes_and_seeds_draw_independently():
    keys = place_keys("d", TextRows(map(str, range(4000))))
    drawn = [uniform(keys, seed, purpose) for seed, purpose in ((0, "split"), (1, "split"), (0, "max_rows"))]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.06


def test_image_names_count_and_bytes_do_not():
    def key(**row):
        store = TextRows(["x"])
        store.read = lambda _: row
        return content_keys("d", store, COLUMNS)[0]

    assert key(captions="a", image=b"1") == key(captions="a", image=b"2", idx=5) == key(captions="a")
    assert key(captions="a", image="1.png") != key(captions="a", image="2.png")
    assert key(captions="a", image={"bytes": b"1", "path": "1.png"}) == key(
        captions="a", image={"bytes": None, "path": "1.png"}
    )


def test_rows_of_formats_go_by_their_records():
    store = TextRows(["x"] * 3)
    names = ["1.png", "2.png", "1.png"]
    store.record = lambda row: Record("t2i", "a", target=StoredImage(names[row], lambda: b""))
    keys = content_keys("d", store, COLUMNS)
    assert keys[0] == keys[2] != keys[1]


def test_images_in_parquet_are_not_read(tmp_path):
    rows = [
        {
            "captions": json.dumps({"c": text}),
            "image": b"no image",
            "input_images": [{"bytes": b"x", "path": f"{text}.png"}],
        }
        for text in "abcab"
    ]
    write_parquet(tmp_path / "0.parquet", rows, row_group_size=2)
    store = ParquetRows([tmp_path / "0.parquet"], ("captions", "image", "input_images"))
    assert [sorted(row) for row in store.texts(0)] == [["captions", "input_images"]] * 2
    assert store.texts(0)[1]["input_images"] == [{"path": "b.png"}]
    keys = content_keys("d", store, ("captions", "image", "input_images"))
    assert keys[0] == keys[3] and keys[1] == keys[4] and len(set(keys)) == 3
    only_bytes = ParquetRows([tmp_path / "0.parquet"], ("image",))
    assert only_bytes.texts(2) == [{}] and len(set(content_keys("d", only_bytes, ("image",)))) == 5


def test_rows_stay_in_their_units_and_survive_pickling(tmp_path):
    write_parquet(tmp_path / "0.parquet", [{"captions": str(n)} for n in range(10)], row_group_size=4)
    store = SubsetRows(ParquetRows([tmp_path / "0.parquet"], ("captions",)), np.array([1, 2, 9]))
    assert store.unit_lengths == [2, 0, 1]
    store = pickle.loads(pickle.dumps(store))
    assert [store.read(row)["captions"] for row in range(3)] == ["1", "2", "9"]
    assert store.where(2) == (str(tmp_path / "0.parquet"), 9) and store.folder(0) == tmp_path


def test_uneven_splits_are_told(caplog):
    store = TextRows(["always the same"] * 200)
    with pytest.raises(DataError, match=r"nothing is left for use_split: validation.*\n.*by: row"):
        for seed in range(99):
            chosen([store], split={"validation": 0.02, "seed": seed}, use_split="validation")
    store = TextRows([*["always the same"] * 200, *map(str, range(200))])
    for seed in range(20):
        chosen([store], split={"validation": 0.2, "seed": seed})
    assert "have the same texts" in caplog.text and "by: row" in caplog.text


# --- in a dataset YAML ----------------------------------------------------------------------------------------------


def write_captions(folder, count=60):
    rows = [{"image": encoded(), "captions": json.dumps({"c": f"caption {n}"})} for n in range(count)]
    write_parquet(folder / "data" / "0.parquet", rows, row_group_size=7)


def test_groups_of_both_sides_read_the_same_files(tmp_path):
    write_captions(tmp_path)
    group = {"dataset_names": ["data"], "type": "t2i_pretrain", "image_transform_args": VAE}
    split = {"split": {"validation": 0.2}}
    config = {
        "train": {**group, **split, "weight": 1},
        "held_out": {**group, **split, "use_split": "validation"},
        "dataset_info": {"t2i_pretrain": {"data": {"data_dir": "data"}}},
    }
    train, held_out = build_sources(config, context(tmp_path))
    rows = [{plan.row for plan in all_plans(built.source)} for built in (train, held_out)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 60 and 3 <= len(rows[1]) <= 24
    assert held_out.subset == {
        "split": {"validation": 0.2, "by": "content", "seed": 0},
        "use_split": "validation",
    }
    assert all_plans(train.source)[0].load().name == "data"
    for other in ({"split": {"validation": 0.3}}, {}):
        with pytest.raises(DataError, match=r"train and held_out both read .*0\.parquet.*\n.*same split"):
            build_sources(config | {"held_out": {**group, **other}}, context(tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_split": "validation"}, "needs a split"),
        ({"split": 0.1}, "must be a mapping such as"),
        ({"split": {"validation": "0.1"}}, r"multi_ref.split.validation in the dataset config must be a number"),
        ({"split": {"validation": 1.5}}, "between 0 and 1"),
        ({"split": {"validation": 0}}, "between 0 and 1"),
        ({"split": {"val": 0.1}}, "known: validation"),
        ({"split": {}}, "lacks validation"),
        ({"split": {"validation": 0.1, "by": "rows"}}, "did you mean 'row'"),
        ({"split": {"validation": 0.1, "by": 3}}, "content or row"),
        ({"split": {"validation": 0.1, "seed": -1}}, "split.seed"),
        ({"split": {"validation": 0.1}, "use_split": "valid"}, "did you mean 'validation'"),
        ({"split": {"validation": 0.1}, "use_split": True}, "train or validation"),
        ({"max_rows": 0}, "positive whole number"),
        ({"max_rows": "10"}, "positive whole number"),
        ({"max_rows": [1, 2]}, "2 numbers for 1 dataset_names"),
        ({"max_row": 3}, "did you mean 'max_rows'"),
        ({"subset_seed": 0.5}, "subset_seed"),
    ],
)
def test_wrong_keys_are_named(tmp_path, keys, message):
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a"}])
    with pytest.raises(DataError, match=message):
        build_group(tmp_path, "multi_ref", {"jsonl_path": "rows.jsonl"}, settings=keys)
