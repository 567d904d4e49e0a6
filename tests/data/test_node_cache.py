"""Copies of data files on a machine's own disk: made once, complete or absent, and never a reason to stop."""

import errno
import multiprocessing
import os
import pickle
import shutil

import pytest

from echo4o.data.sources import node_cache
from echo4o.data.sources.node_cache import NodeCache
from echo4o.data.sources.parquet import ParquetRows
from tests.data.rows_on_disk import build_group, encoded, write_parquet


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "shared" / "0.parquet"
    write_parquet(path, [{"caption": f"row {number}"} for number in range(6)], row_group_size=2)
    return path


def copies(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def test_a_file_is_copied_when_it_is_first_read_and_keeps_its_name(source, tmp_path):
    folder = tmp_path / "disk" / "cache"
    rows = ParquetRows([source], ["caption"], NodeCache(folder))
    assert not folder.exists()
    assert rows.read(3) == {"caption": "row 3"}
    (copy,) = copies(folder)
    assert copy.name.endswith("-0.parquet") and copy.read_bytes() == source.read_bytes()
    assert rows.where(3) == (str(source), 3) and rows.folder(3) == source.parent
    source.write_bytes(b"")
    assert [rows.read(row)["caption"] for row in range(6)] == [f"row {row}" for row in range(6)]


def test_the_setting_reaches_the_rows_and_plans_name_the_file_itself(tmp_path):
    write_parquet(tmp_path / "data" / "0.parquet", [{"image": encoded(), "captions": '{"c": "x"}'}] * 3)
    folder = tmp_path / "cache"
    group = build_group(tmp_path, "t2i_pretrain", {"data_dir": "data"}, cache_dir=folder)
    assert not folder.exists()
    plan = pickle.loads(pickle.dumps(group)).source.plan(0, 0)
    assert len(copies(folder)) == 1
    assert plan.row.startswith(f"{tmp_path}/data/0.parquet:") and plan.load().row == plan.row


def test_a_copy_is_made_once_and_a_changed_file_is_copied_anew(source, tmp_path):
    folder = tmp_path / "cache"
    first = NodeCache(folder).local(source)
    assert NodeCache(folder).local(source) == first and len(copies(folder)) == 1
    os.utime(source, ns=(1, 1))
    assert NodeCache(folder).local(source) != first and len(copies(folder)) == 2


def test_files_of_one_name_in_different_folders_are_told_apart(source, tmp_path):
    other = tmp_path / "other" / source.name
    other.parent.mkdir()
    shutil.copy2(source, other)
    cache = NodeCache(tmp_path / "cache")
    assert cache.local(source) != cache.local(other)


def test_a_copy_that_vanished_is_made_again(source, tmp_path):
    cache = NodeCache(tmp_path / "cache")
    cache.local(source).unlink()
    assert cache.local(source).read_bytes() == source.read_bytes()


def test_long_names_are_shortened(source, tmp_path):
    long = source.with_name("ü" * 115 + ".parquet")
    shutil.copy2(source, long)
    assert NodeCache(tmp_path / "cache").local(long).parent == tmp_path / "cache"


def read_at_once(folder, source, barrier, counted, results):
    original = node_cache._copy_whole

    def counting(*paths):
        with counted.get_lock():
            counted.value += 1
        original(*paths)

    node_cache._copy_whole = counting
    barrier.wait(30)
    results.put(NodeCache(folder).local(source).read_bytes())


def test_of_many_processes_one_copies_and_the_others_wait(tmp_path):
    source, folder = tmp_path / "big.parquet", tmp_path / "cache"
    content = os.urandom(1 << 22)
    source.write_bytes(content)
    context = multiprocessing.get_context("fork")
    barrier, counted, results = context.Barrier(6), context.Value("i", 0), context.Queue()
    processes = [
        context.Process(target=read_at_once, args=(folder, source, barrier, counted, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    assert all(results.get(timeout=60) == content for _ in processes)
    for process in processes:
        process.join()
    assert counted.value == 1
    assert len(copies(folder)) == 1 and not list(folder.glob(".*.partial"))


def test_what_a_killed_process_left_is_removed(source, tmp_path):
    cache = NodeCache(tmp_path / "cache")
    copy = cache.local(source)
    left_over = copy.with_name(f".{copy.name}.0123.partial")
    copy.rename(left_over)
    assert NodeCache(tmp_path / "cache").local(source) == copy
    assert not left_over.exists()


def test_an_unusable_folder_is_one_warning_and_the_files_are_read_where_they_are(source, tmp_path, caplog):
    other = source.with_name("1.parquet")
    shutil.copy2(source, other)
    (tmp_path / "cache").write_text("not a folder")
    rows = ParquetRows([source, other], ["caption"], NodeCache(tmp_path / "cache"))
    assert [rows.read(row)["caption"] for row in (0, 2, 6, 11)] == ["row 0", "row 2", "row 0", "row 5"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "--data_cache_dir" in record.getMessage()


def test_a_disk_that_is_too_small_is_not_filled(source, tmp_path, caplog, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    assert NodeCache(tmp_path / "cache").local(source) == source
    assert "0 MB are free" in caplog.text and not copies(tmp_path / "cache")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(source, tmp_path, caplog, monkeypatch):
    def full(reader, writer, size):
        writer.write(reader.read(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node_cache.shutil, "copyfileobj", full)
    cache = NodeCache(tmp_path / "cache")
    assert cache.local(source) == source and cache.local(source) == source
    assert caplog.text.count("No space left") == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_is_gone_is_not_the_cache_s_fault(tmp_path, caplog):
    cache = NodeCache(tmp_path / "cache")
    assert cache.local(tmp_path / "gone.parquet") == tmp_path / "gone.parquet"
    assert not caplog.records
