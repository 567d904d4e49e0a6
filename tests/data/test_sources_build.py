"""The dataset YAML: groups, paths, counts, and what is refused before the first row."""

import json
import pickle

import pytest
import yaml

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources import build_sources, read_dataset_config
from tests.data.rows_on_disk import VIT, all_plans, build_group, context, encoded, write_jsonl, write_parquet

UPSTREAM_YAML = """
t2i_pretrain:
  dataset_names:
  - t2i
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  is_mandatory: true
  num_used_data: [10]
  weight: 1

unified_edit:
  dataset_names:
  - seedxedit_multi
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  vit_image_transform_args: {image_stride: 14, max_image_size: 518, min_image_size: 224}
  is_mandatory: false
  num_used_data: [10]
  weight: 1

vlm_sft:
  dataset_names:
  - llava_ov
  image_transform_args: {image_stride: 14, max_image_size: 980, min_image_size: 378, max_pixels: 2_007_040}
  frame_sampler_args: {max_num_frames: 12, min_num_frames: 8}
  is_mandatory: true
  shuffle_lines: True
  shuffle_seed: 0
  num_used_data: [1000]
  weight: 1
"""
LIMITS = {"max_latent_size": 64, "vit_max_num_patch_per_side": 70}


def caption_row(text):
    return {"image": encoded(), "captions": json.dumps({"c": text})}


def rows_of(source):
    """row strings of an epoch, short."""
    return [plan.row.rsplit("/", 1)[1] for plan in all_plans(source)]


def write_upstream_data(folder):
    write_parquet(folder / "t2i" / "0.parquet", [caption_row("a")] * 2)
    edit = {"image_list": [encoded(), encoded()], "instruction_list": [["x"]]}
    write_parquet(folder / "edit" / "0.parquet", [edit] * 3)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write_jsonl(folder / "vlm.jsonl", [{"conversations": turns}] * 4)
    (folder / "info.json").write_text("{}")
    return {
        "t2i_pretrain": {"t2i": {"data_dir": "t2i", "num_files": 1, "num_total_samples": 2}},
        "unified_edit": {
            "seedxedit_multi": {
                "data_dir": "edit",
                "num_files": 1,
                "num_total_samples": 3,
                "parquet_info_path": "info.json",
            }  # fmt: skip
        },
        "vlm_sft": {"llava_ov": {"data_dir": "t2i", "jsonl_path": "vlm.jsonl", "num_total_samples": 4}},
    }


@pytest.mark.parametrize("where", ["inline", "argument", "file argument", "file in the YAML"])
def test_upstreams_yaml_works_unchanged(tmp_path, where):
    info = write_upstream_data(tmp_path)
    (tmp_path / "data.yaml").write_text(UPSTREAM_YAML)
    (tmp_path / "info.yaml").write_text(yaml.safe_dump(info))
    config = read_dataset_config(tmp_path / "data.yaml")
    argument = {"argument": info, "file argument": "info.yaml"}.get(where)
    if where in ("inline", "file in the YAML"):
        config["dataset_info"] = info if where == "inline" else "info.yaml"
    groups = build_sources(config, context(tmp_path, limits=LIMITS, dataset_info=argument))
    assert [group.name for group in groups] == ["t2i_pretrain", "unified_edit", "vlm_sft"]
    assert [group.is_mandatory for group in groups] == [True, False, True]
    assert [group.weight for group in groups] == [1.0, 1.0, 1.0]
    # Ten times the one file; a thousand lines of four.
    assert [len(group.source) for group in groups] == [20, 30, 1000]
    for group in groups:
        assert pickle.loads(pickle.dumps(group.source)).plan(0, 3).num_tokens == group.source.plan(0, 3).num_tokens


def test_num_used_data_counts_files(tmp_path):
    for number, length in enumerate([2, 3, 4]):
        write_parquet(tmp_path / "rows" / f"{number}.parquet", [caption_row("x")] * length)

    def length(used):
        settings = {} if used is None else {"num_used_data": used}
        return len(build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}, settings=settings).source)

    assert [length(used) for used in (None, [1], [2], [3], [4], [7])] == [9, 2, 5, 9, 11, 20]
    source = build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}, settings={"num_used_data": [4]}).source
    assert rows_of(source)[-2:] == ["0.parquet:0", "0.parquet:1"]
    assert len({plan.seed for plan in all_plans(source)}) == 11, "a repeated row has randomness of its own"


def test_num_used_data_counts_lines(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"caption": "x", "image": "a.png"}] * 200)

    def lines(**settings):
        group = build_group(tmp_path, "t2i_pretrain", {"jsonl_path": "r.jsonl"}, settings=settings)
        store = group.source._data_sets[0].store
        return [store.where(row)[1] for row in range(len(store))]

    assert lines() == list(range(200))
    assert lines(num_used_data=[3]) == [0, 1, 2]
    assert lines(num_used_data=[202]) == [*range(200), 0, 1]
    chosen = lines(num_used_data=[10], shuffle_lines=True, shuffle_seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) != list(range(10))
    assert chosen != lines(num_used_data=[10], shuffle_lines=True, shuffle_seed=2)


def test_num_used_data_counts_lines_of_a_folder_of_jsonl(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", [{"caption": "x", "image": "a.png"}] * 4)
    write_jsonl(tmp_path / "rows" / "b.jsonl", [{"caption": "x", "image": "a.png"}] * 4)

    def length(**settings):
        return len(build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}, settings=settings).source)

    assert [length(), length(num_used_data=[3]), length(num_used_data=[40])] == [8, 3, 40]


def test_several_data_sets_are_one_position_space(tmp_path):
    write_parquet(tmp_path / "a" / "a.parquet", [caption_row("x")] * 5, row_group_size=2)
    write_jsonl(tmp_path / "b.jsonl", [{"caption": "y", "image": str(tmp_path / "y.png")}] * 3)
    (tmp_path / "y.png").write_bytes(encoded())
    info = {"t2i_pretrain": {"a": {"data_dir": "a"}, "b": {"jsonl_path": "b.jsonl"}}}
    config = {"t2i_pretrain": {"dataset_names": ["a", "b"], "weight": 1}, "dataset_info": info}
    (group,) = build_sources(config, context(tmp_path, limits=LIMITS))
    plans = all_plans(group.source)
    assert [plan.name for plan in plans] == ["a"] * 5 + ["b"] * 3
    assert [plan.load().row for plan in plans] == [plan.row for plan in plans]


def test_a_group_may_have_a_name_of_its_own(tmp_path):
    write_parquet(tmp_path / "a.parquet", [caption_row("x")])
    config = {"replay": {"type": "t2i_pretrain", "dataset_names": ["a"]},
              "dataset_info": {"replay": {"a": {"data_dir": "a.parquet"}}}}  # fmt: skip
    (group,) = build_sources(config, context(tmp_path, limits=LIMITS))
    assert (group.name, len(group.source), group.weight) == ("replay", 1, 0.0)


# --- files that are empty or broken -------------------------------------------------------------------------------


def write_shards(folder, num_good, empty=(), broken=()):
    for number in range(num_good):
        write_parquet(folder / f"good_{number}.parquet", [caption_row("x")] * 2)
    for name in empty:
        write_parquet(folder / f"{name}.parquet", [])
    for name in broken:
        (folder / f"{name}.parquet").write_bytes(b"PAR1 not really PAR1")


def test_empty_and_broken_files_are_left_out_with_a_word(tmp_path, caplog):
    write_shards(tmp_path / "rows", num_good=9, empty=["no_rows"], broken=["garbage"])
    (tmp_path / "rows" / "zero_bytes.parquet").touch()
    source = build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}).source
    assert len(source) == 18
    store = source._data_sets[0].store
    assert (len(store.empty_files), len(store.unreadable_files), store.num_files) == (2, 1, 12)
    assert all(name in caplog.text for name in ("no_rows", "zero_bytes", "garbage"))
    assert "3 of 12 files are left out: 2 without rows, 1 unreadable" in caplog.text


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    write_shards(tmp_path / "rows", num_good=4, broken=["garbage"])
    with pytest.raises(DataError, match="1 of 5 files are left out.*\n.*garbage.parquet"):
        build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"})
    assert len(build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}, max_bad_file_share=0.2).source) == 8


def test_a_minority_of_files_may_be_empty(tmp_path):
    write_shards(tmp_path / "rows", num_good=2, empty=["a"])
    assert len(build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}).source) == 4
    write_shards(tmp_path / "rows", num_good=0, empty=["b", "c"])
    with pytest.raises(DataError, match="3 without rows"):
        build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"})


@pytest.mark.parametrize("name", ["empty.parquet", "empty.jsonl"])
def test_a_source_without_rows_is_an_error(tmp_path, name):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(DataError, match="dataset_info.t2i_pretrain.data has no rows"):
        build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"})


def test_a_row_group_broken_after_start_up_is_a_bad_row(tmp_path):
    path = tmp_path / "rows" / "a.parquet"
    write_parquet(path, [caption_row("x")] * 4)
    source = build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}).source
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RowError) as caught:
        source.plan(0, 0)
    assert caught.value.reason == "parquet unreadable" and caught.value.where.startswith(str(path))


def test_broken_lines_are_bad_rows_and_blank_lines_none(tmp_path):
    good = json.dumps({"caption": "x", "image": "a.png"})
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "r.jsonl").write_text(f"{good}\n\n  \n{{broken\r\n[1]\n\n{good}")
    source = build_group(tmp_path, "t2i_pretrain", {"jsonl_path": "r.jsonl"}).source
    assert len(source) == 4
    outcomes = []
    for position in range(4):
        try:
            outcomes.append(source.plan(0, position).load().name)
        except RowError as error:
            outcomes.append(error.reason)
    assert sorted(outcomes) == ["data", "data", "invalid json", "invalid json"]


# --- wrong settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wieght": 2}, "did you mean 'weight'"),
        ({"max_refs": 2}, "unknown t2i_pretrain.max_refs"),
        ({"weight": -1}, "must not be negative"),
        ({"dataset_names": []}, "needs dataset_names"),
        ({"dataset_names": ["dota"]}, "did you mean 'data'"),
        ({"num_used_data": [1, 2]}, "2 numbers for 1"),
        ({"num_used_data": [0]}, "positive"),
        ({"image_transform_args": VIT}, "multiple of 16"),
        ({"image_transform_args": {"image_stride": 16}}, "lacks max_image_size, min_image_size"),
        ({"type": "t2i_pretrian"}, "did you mean 't2i_pretrain'"),
    ],
)
def test_wrong_group_settings_name_the_fix(tmp_path, change, message):
    write_parquet(tmp_path / "rows" / "a.parquet", [caption_row("x")])
    with pytest.raises(DataError, match=message):
        build_group(tmp_path, "t2i_pretrain", {"data_dir": "rows"}, settings=change)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("weight", "abc", "a number"),
        ("weight", None, "a number"),
        ("weight", True, "a number"),
        ("weight", float("nan"), "a number"),
        ("image_pixel_limit", "abc", "a positive whole number"),
        ("num_used_data", 1.5, "a whole number"),
        ("num_used_data", "1", "a whole number"),
        ("num_used_data", [1.5], "a positive whole number"),
        ("num_used_data", True, "a positive whole number"),
        ("is_mandatory", "false", "true or false, without quotes"),
        ("resume_data_status", 1, "true or false"),
        ("shuffle_lines", "yes", "true or false"),
        ("shuffle_seed", "a", "a whole number"),
        ("noise_copies", 1.5, "a whole number"),
        ("noise_copies", "2", "a whole number"),
        ("max_refs", "3", "a whole number"),
        ("inline_references", "false", "true or false, without quotes"),
        ("image_transform_args.image_stride", 16.0, "a whole number"),
        ("image_transform_args.max_image_size", "64", "a whole number"),
        ("vit_image_transform_args.max_pixels", "1e6", "a whole number"),
        ("image_transform_args.pixel_cap", 2, "text"),
    ],
)
def test_values_of_a_wrong_type_name_key_value_and_what_is_expected(tmp_path, key, value, expected):
    write_parquet(tmp_path / "rows" / "a.parquet", [caption_row("x")])
    outer, _, inner = key.partition(".")
    sizes = {"image_stride": 112, "max_image_size": 112, "min_image_size": 112}
    settings = {outer: {**sizes, inner: value} if inner else value}
    with pytest.raises(DataError) as caught:
        build_group(tmp_path, "multi_ref", {"data_dir": "rows"}, settings=settings)
    message = str(caught.value)
    assert f"multi_ref.{key} in the dataset config must be {expected}" in message and repr(value).strip("[]") in message


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"data_dir": "absent"}, "does not exist"),
        ({"data_dirs": "rows"}, "did you mean 'data_dir'"),
        ({"jsonl_path": "absent.jsonl"}, "does not exist"),
        ({"jsonl_path": "array.json"}, "one JSON array"),
        ({"data_dir": "empty"}, "no .parquet or .jsonl files"),
        ({}, "needs data_dir"),
    ],
)
def test_wrong_paths_name_the_fix(tmp_path, entry, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "array.json").write_text('[{"caption": "x"}]')
    with pytest.raises(DataError, match=message):
        build_group(tmp_path, "t2i_pretrain", entry)


def test_missing_information_names_the_fix(tmp_path):
    group = {"t2i_pretrain": {"dataset_names": ["a"]}}
    for config, message in [
        (group, "no dataset_info"),
        ({**group, "dataset_info": {"vlm_sft": {}}}, "has no group 't2i_pretrain'"),
        ({"dataset_info": {}}, "no groups"),
        ({"t2i_pretrain": None, "dataset_info": {}}, "must be a mapping"),
        ({**group, "dataset_info": "absent.yaml"}, "cannot read dataset_info"),
    ]:
        with pytest.raises(DataError, match=message):
            build_sources(config, context(tmp_path))
    with pytest.raises(DataError, match="visual_gen"):
        build_sources({**group, "dataset_info": {}}, context(tmp_path, visual_gen=False))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DataError, match="cannot be parsed"):
        read_dataset_config(tmp_path / "bad.yaml")
