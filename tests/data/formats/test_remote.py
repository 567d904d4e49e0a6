"""The same data behind fsspec URLs: parquet read in place, the rest fetched once."""

import uuid

import fsspec
import pytest

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats import FORMATS
from echo4o.data.sources.jsonl import JsonlRows
from echo4o.data.sources.parquet import ParquetRows
from echo4o.data.sources.remote import cache_folder, fetched, is_url, list_files, local_or_url
from tests.data.formats import miniatures
from tests.data.formats.miniatures import num_references, reference, target, text, write
from tests.data.rows_on_disk import all_plans, build_group, shape_of


@pytest.fixture
def bucket():
    """An empty remote folder in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    system, path = fsspec.core.url_to_fs(url)
    if system.exists(path):
        system.rm(path, recursive=True)


def upload(folder, url):
    system, path = fsspec.core.url_to_fs(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            system.pipe_file(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


@pytest.fixture(params=["memory", "file"])
def remote(request, bucket, tmp_path):
    """Uploads a miniature; gives its URL."""

    def put(name):
        path = write(name, tmp_path / "source")
        folder = path if path.is_dir() else path.parent
        return upload(folder, bucket) if request.param == "memory" else f"file://{folder}"

    return put


@pytest.mark.parametrize("name", ["mico", "bagel_multi_ref", "bagel_t2i", "native", "blip3o", "hf_dataset"])
def test_formats_open_from_urls(name, remote, tmp_path):
    url, fmt = remote(name), miniatures.MINIATURES[name][1]
    if name == "hf_dataset" and url.startswith("memory"):
        pytest.skip("a saved folder is read where it is mapped into memory")
    store = FORMATS[fmt].open(url, cache_dir=tmp_path / "cache")
    for row in range(6):
        record = store.record(row)
        assert record.target.read() == target(row)
        assert record.instructions in (text(row), [[text(row)]], [text(row), text(row) + "!"])
        if record.kind == "multi_ref":
            assert [i.read() for i in record.references] == [reference(row, n) for n in range(num_references(row))]


def test_remote_images_loose_and_in_archives(bucket, tmp_path):
    root = write("native", tmp_path / "source")
    (root / "images" / "00000.jpg").rename(tmp_path / "one.jpg")
    miniatures.tar(tmp_path / "up" / "more.tar.gz", [("images/00000.jpg", target(0))], "w:gz")
    upload(root, bucket)
    upload(tmp_path / "up", f"{bucket}/shards")
    store = FORMATS["native"].open(root / "train.jsonl", images=bucket, cache_dir=tmp_path / "cache")
    (root / "images").rename(tmp_path / "away")
    assert [store.record(row).target.read() for row in range(6)] == [target(row) for row in range(6)]


def test_remote_data_trains(bucket, tmp_path):
    upload(write("bagel_multi_ref", tmp_path / "a"), f"{bucket}/parquet")
    upload(write("mico", tmp_path / "b"), f"{bucket}/mico")
    limits = {"max_latent_size": 16}
    plain = build_group(tmp_path, "multi_ref", {"data_dir": f"{bucket}/parquet"}, limits=limits)
    direct = build_group(tmp_path, "multi_ref", {"format": "mico", "path": f"{bucket}/mico"}, limits=limits)
    shapes = [[shape_of(plan.load()) for plan in all_plans(group.source)] for group in (plain, direct)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 6
    assert all_plans(plain.source)[0].row == f"{bucket}/parquet/chunk_0.parquet:0"


def test_jsonl_is_fetched_once(bucket, tmp_path, caplog):
    caplog.set_level("INFO")
    miniatures.lines(tmp_path / "rows.jsonl", [{"a": 1}, {"a": 2}])
    fsspec.core.url_to_fs(bucket)[0].pipe_file(f"{bucket}/rows.jsonl", (tmp_path / "rows.jsonl").read_bytes())
    for _ in range(2):
        rows = JsonlRows([f"{bucket}/rows.jsonl"], cache_dir=tmp_path / "cache")
        assert [rows.read(n) for n in range(2)] == [{"a": 1}, {"a": 2}]
        assert rows.where(1) == (f"{bucket}/rows.jsonl", 1)
    assert sum(line.startswith("fetched") for line in caplog.messages) == 1


def test_remote_row_groups_are_read_one_at_a_time(bucket, tmp_path, monkeypatch):
    rows = [{"x": bytes(100_000) + bytes([n])} for n in range(8)]
    miniatures.table(tmp_path / "0.parquet", rows, group=1)
    system, path = fsspec.core.url_to_fs(bucket)
    system.pipe_file(f"{path}/0.parquet", (tmp_path / "0.parquet").read_bytes())
    store = ParquetRows([f"{bucket}/0.parquet"], ["x"])
    assert store.unit_lengths == [1] * 8 and store.read(5)["x"][-1] == 5
    system.rm(f"{path}/0.parquet")
    with pytest.raises(RowError, match="parquet unreadable"):
        store.read(6)


def test_what_cannot_be_reached_is_named(bucket, tmp_path):
    with pytest.raises(DataError, match="does not exist or is empty"):
        list_files(f"{bucket}/nothing")
    with pytest.raises(DataError, match="cannot read memory"):
        fetched(f"{bucket}/nothing.tar", tmp_path)
    with pytest.raises(DataError, match="cannot open nonsense://x"):
        list_files("nonsense://x")
    with pytest.raises(DataError, match="is remote; this format is read from a local folder"):
        FORMATS["echo4o_image"].open("memory://data")
    assert not list(tmp_path.glob("*.partial"))


def test_paths_and_urls(tmp_path):
    assert is_url("s3://a/b") and is_url("file:///a") and not is_url("C:/a") and not is_url(tmp_path)
    assert local_or_url("file:///a/b") == local_or_url("/a/b")
    assert local_or_url("b", tmp_path) == tmp_path / "b" and local_or_url("hf://datasets/a/b") == "hf://datasets/a/b"
    assert cache_folder(tmp_path, None) == tmp_path / ".echo4o_cache"
    assert cache_folder(tmp_path, tmp_path / "c") == tmp_path / "c"
