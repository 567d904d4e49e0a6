"""Every format in its published layout: recognised, read exactly, trained on."""

import json
import pickle
import zipfile

import pytest

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats import FORMATS, detect, format_named
from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sources import build_sources
from tests.data.formats import miniatures
from tests.data.formats.miniatures import MINIATURES, num_references, reference, target, text, write
from tests.data.rows_on_disk import VAE, VIT, context

GROUP_OF = {"t2i": "t2i_pretrain", "multi_ref": "multi_ref", "edit": "unified_edit", "vlm": "vlm_sft"}


def opened(name, tmp_path, **options):
    return FORMATS[MINIATURES[name][1]].open(write(name, tmp_path), **options)


def records(store):
    return [store.record(row) for row in range(len(store))]


@pytest.mark.parametrize("name", MINIATURES)
def test_is_recognised_and_opens(name, tmp_path):
    _, fmt, kinds = MINIATURES[name]
    path = write(name, tmp_path)
    assert detect(path) == fmt
    store = format_named(fmt).open(path)
    assert {store.kind(row) for row in range(len(store))} == set(kinds)
    assert sum(store.unit_lengths) == len(store)
    for row, record in enumerate(records(store)):
        assert record.kind == store.kind(row)
        assert record.where == "{}:{}".format(*store.where(row))


@pytest.mark.parametrize("name", [name for name, entry in MINIATURES.items() if "multi_ref" in entry[2]])
def test_references_come_in_order_and_with_their_bytes(name, tmp_path):
    found = [record for record in records(opened(name, tmp_path)) if record.kind == "multi_ref"]
    assert found
    for record in found:
        given = record.instructions
        given = given[0][0] if isinstance(given, list) else given
        row = int(given.split()[1].rstrip(":"))
        count = 2 if name == "omnigen2" else num_references(row)
        assert given == text(row)
        assert [image.read() for image in record.references] == [reference(row, place) for place in range(count)]
        assert record.target.read() == target(row)


@pytest.mark.parametrize("name", [name for name, entry in MINIATURES.items() if "t2i" in entry[2]])
def test_text_to_image_rows_keep_image_and_text(name, tmp_path):
    found = [record for record in records(opened(name, tmp_path)) if record.kind == "t2i"]
    for number, record in enumerate(found):
        row = number % 6
        assert record.references == () and record.target.read() == target(row)
        assert record.instructions in (text(row), [text(row), text(row) + "!"])


def test_edit_chains_keep_their_nesting(tmp_path):
    store = opened("bagel_edit", tmp_path)
    record = store.record(2)
    assert record.instructions == [["a2", "b2"], [text(2), "d2"]]
    assert [image.read() for image in record.images] == [reference(2, 0), reference(2, 1), target(2)]
    assert store.read(2)["instruction_list"] == record.instructions


def test_other_fields_are_kept(tmp_path):
    assert opened("echo4o_image", tmp_path / "e").record(1).extra == {"task_type": "t2i", "type": "T1"}
    extra = opened("macro", tmp_path / "m").record(1).extra
    assert extra == {"task": "customization", "idx": 1, "scores": {"quality": 9.5, "following": [1, 2]}}
    captions = opened("bagel_t2i", tmp_path / "b").record(0).extra["captions"]
    assert json.loads(captions) == {"short": text(0), "long": text(0) + "!"}
    assert opened("folder_csv", tmp_path / "c").record(1).extra == {"price": "1"}


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("pickled", [False, True])
def test_trains_a_packed_batch(name, pickled, tmp_path):
    _, fmt, kinds = MINIATURES[name]
    path = write(name, tmp_path)
    config = {"dataset_info": {}}
    for kind in kinds:
        group = {"dataset_names": ["data"], "weight": 1, "image_transform_args": VIT if kind == "vlm" else VAE}
        if kind in ("multi_ref", "edit"):
            group["vit_image_transform_args"] = VIT
        config[GROUP_OF[kind]] = group | {"is_mandatory": True}
        config["dataset_info"][GROUP_OF[kind]] = {"data": {"format": fmt, "path": str(path.relative_to(tmp_path))}}
    ctx = context(tmp_path, cache_dir=tmp_path / "cache", limits={"max_latent_size": 16})
    groups = build_sources(config, ctx)
    if pickled:
        groups = pickle.loads(pickle.dumps(groups))
    packer = Packer(PackingConfig(1, 2, 3, 4, max_latent_size=16, vit_max_num_patch_per_side=8))
    limits = {"expected_num_tokens": 600, "max_num_tokens": 1500, "max_num_tokens_per_sample": 700}
    loader_config = LoaderConfig(**limits, prefer_buffer_before=300, max_buffer_size=5, num_workers=0)
    with PackedLoader(groups, packer, loader_config) as loader:
        batch = next(iter(loader))
    assert batch.sample_lens


@pytest.mark.parametrize("what", ["root", "part", "file", "extracted"])
def test_echo4o_image_opens_from_its_root_a_part_or_a_file(what, tmp_path):
    root = miniatures.echo4o_image(tmp_path, extracted=what == "extracted")
    part = root / "Multi-Reference-Image"
    path = {"root": root, "extracted": root, "part": part, "file": part / "Multi-Reference-Image.jsonl"}[what]
    assert detect(path) == "echo4o_image"
    store = FORMATS["echo4o_image"].open(path, kinds=["multi_ref"], cache_dir=tmp_path / "cache")
    assert len(store) == 6
    assert [image.read() for image in store.record(5).images] == [*(reference(5, i) for i in range(3)), target(5)]
    # Nothing is unpacked for what is extracted, and only the parts that are asked for.
    assert len(list((tmp_path / "cache").glob("*.tar"))) == (0 if what == "extracted" else 2)


def test_unpacked_archives_are_used_again(tmp_path, caplog):
    root = miniatures.echo4o_image(tmp_path)
    caplog.set_level("INFO")
    FORMATS["echo4o_image"].open(root)
    assert sum(line.startswith("unpacked ") for line in caplog.messages) == 6
    caplog.clear()
    store = FORMATS["echo4o_image"].open(root)
    assert not caplog.messages and store.record(0).target.read() == target(0)
    assert list((root / "Instruction-Following-Image").rglob("*.tar"))


def test_omnigen2_ratios_choose_rows_in_training_only(tmp_path):
    mix = write("omnigen2", tmp_path, 8)
    assert len(FORMATS["omnigen2"].open(mix)) == 24
    store = FORMATS["omnigen2"].open(mix, apply_ratios=True)
    kinds = [store.kind(row) for row in range(len(store))]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"t2i": 12, "edit": 6, "multi_ref": 6}


def test_omnigen2_mix_that_contains_itself(tmp_path):
    mix = write("omnigen2", tmp_path)
    (mix.parent / "t2i.yml").write_text("data: [{path: mix.yml, ratio: 1}]")
    with pytest.raises(DataError, match="contains itself"):
        FORMATS["omnigen2"].open(mix)


def test_macro_splits(tmp_path):
    root = write("macro", tmp_path)
    assert len(FORMATS["macro"].open(root)) == 6
    assert len(FORMATS["macro"].open(root, split="eval")) == 1
    with pytest.raises(DataError, match="no split 'test'"):
        FORMATS["macro"].open(root, split="test")


def test_blip3o_counts_samples_without_a_pair(tmp_path):
    store = opened("blip3o", tmp_path)
    assert len(store) == 6
    assert [line.partition(": ")[2] for line in store.problems] == [
        "1 samples lack an image or a text (90000000)",
        "1 samples lack an image or a text (90000001)",
    ]
    assert store.where(4)[1] == 1


def test_blip3o_names_with_dots(tmp_path):
    members = [(f"a.{n}.{end}", data) for n in "12" for end, data in (("jpg", target(int(n))), ("txt", n.encode()))]
    miniatures.tar(tmp_path / "0.tar", [*members, ("b.input.jpg", target(3)), ("b.txt", b"3")])
    store = FORMATS["blip3o"].open(tmp_path)
    assert [record.instructions for record in records(store)] == ["1", "2", "3"]
    assert [record.target.read() for record in records(store)] == [target(1), target(2), target(3)]


def test_columns_of_a_saved_data_set_can_be_mapped(tmp_path):
    rows = [{"a": target(0), "b": target(1), "result": target(2), "says": "x", "text": "no"}]
    miniatures.table(tmp_path / "data" / "train-0.parquet", rows)
    columns = {"instruction": "says", "input_images": ["b", "a"], "output_image": "result"}
    store = FORMATS["hf_dataset"].open(tmp_path / "data", columns=columns)
    record = store.record(0)
    assert [image.read() for image in record.images] == [target(1), target(0), target(2)]
    assert record.instructions == "x" and record.extra == {"text": "no"}
    with pytest.raises(DataError, match=r"columns.instruction: .* has no speaks; it has a, b, result, says, text"):
        FORMATS["hf_dataset"].open(tmp_path / "data", columns={"instruction": "speaks"})
    with pytest.raises(DataError, match="it can map instruction"):
        FORMATS["hf_dataset"].open(tmp_path / "data", columns={"words": "says"})


def test_parquet_of_a_split(tmp_path):
    for split in ("train", "test"):
        row = {"image": {"bytes": target(0), "path": None}, "text": split}
        miniatures.table(tmp_path / f"{split}-00000-of-00001.parquet", [row])
    opener = FORMATS["hf_dataset"]
    assert opener.open(tmp_path).record(0).instructions == "train"
    assert opener.open(tmp_path, split="test").record(0).instructions == "test"


def test_an_id_on_the_hub_needs_the_library(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'echo4o\[hf\]'"):
        FORMATS["hf_dataset"].open("owner/name")
    with pytest.raises(DataError, match="is no id on the hub"):
        FORMATS["hf_dataset"].open(tmp_path / "nothing")


def test_saved_by_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    from echo4o.data.formats.hf_dataset import LoadedRows

    image = datasets.Image()
    rows = [{"text": "a", "images": [{"bytes": target(n), "path": None} for n in (0, 1)]}] * 3
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.Sequence(image)})
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    for store_rows in (FORMATS["hf_dataset"].open(tmp_path / "saved"), LoadedRows(made, "x", datasets)):
        values = store_rows.rows.read(1) if hasattr(store_rows, "rows") else store_rows.read(1)
        assert [entry["bytes"] for entry in values["images"]] == [target(0), target(1)]
    record = FORMATS["hf_dataset"].open(tmp_path / "saved").record(2)
    assert record.references[0].read() == target(0) and record.target.read() == target(1)


def test_an_id_on_the_hub_is_loaded_by_the_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": datasets.Image()})
    rows = [{"prompt": text(row), "picture": {"bytes": target(row), "path": None}} for row in range(3)]
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options["split"], options["revision"]))
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    store = FORMATS["hf_dataset"].open("owner/name@v1", columns={"output_image": "picture"}, split="test")
    assert asked == [("owner/name", "test", "v1")]
    assert [store.record(row).target.read() for row in range(3)] == [target(row) for row in range(3)]
    assert store.kind(0) == "t2i" and store.record(2).instructions == text(2)
    assert pickle.loads(pickle.dumps(store)).record(1).target.read() == target(1)


def test_folder_references_need_numbers(tmp_path):
    root = write("folder", tmp_path, 3)
    refs = root / "refs" / "product_2"
    (refs / "2.png").rename(refs / "front.png")
    store = FORMATS["folder"].open(root)
    with pytest.raises(RowError, match="order of references unknown: .*number them"):
        store.record(2)
    assert len(store.record(1).references) == 2


def test_folder_orders_by_number_not_by_name(tmp_path):
    root = tmp_path / "p"
    miniatures.files(root / "targets", [("5.jpg", target(0))])
    miniatures.files(root / "refs" / "5", [(f"{n}.png", reference(0, n)) for n in (10, 9, 1)])
    miniatures.files(root, [("captions.json", json.dumps({"5": "words"}).encode())])
    record = FORMATS["folder"].open(root).record(0)
    assert [image.name.rsplit("/", 1)[1] for image in record.references] == ["1.png", "9.png", "10.png"]


def test_folder_of_images_beside_texts(tmp_path):
    miniatures.files(tmp_path, [("a.jpg", target(0)), ("a.txt", b"words\n"), ("b.jpg", target(1))])
    store = FORMATS[detect(tmp_path)].open(tmp_path)
    assert store.record(0).instructions == "words" and store.record(0).kind == "t2i"
    with pytest.raises(RowError, match="instruction missing"):
        store.record(1)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_may_lie_in_a_zip_elsewhere(tmp_path, compression):
    root = write("native", tmp_path)
    (root / "images").rename(root / "elsewhere")
    members = [(f"photos/{path.name}", path.read_bytes()) for path in sorted((root / "elsewhere").iterdir())]
    archive = miniatures.zip_of(tmp_path / "photos.zip", members, compression)
    (root / "elsewhere").rename(tmp_path / "gone")
    store = FORMATS["native"].open(root, images=archive)
    assert [image.read() for image in store.record(2).images] == [*(reference(2, i) for i in range(3)), target(2)]


def test_unknown_folders_are_described(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"Found there: notes.md"):
        detect(tmp_path)
    miniatures.table(tmp_path / "0.parquet", [{"pic": b"", "words": "x"}])
    with pytest.raises(DataError, match=r"Its parquet has pic, words: name them as columns of hf_dataset"):
        detect(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "nothing")
    with pytest.raises(DataError, match="unknown format 'parquet'; known: hf_dataset"):
        format_named("parquet")
