"""Row groups are read once, however many streams of a process take turns."""

import weakref

import pyarrow.parquet as pq
import pytest

from echo4o.data.mixture import GroupCursor
from echo4o.data.sources import SourceGroup
from echo4o.data.sources.parquet import ParquetRows
from tests.data.rows_on_disk import build_group, encoded, write_parquet


@pytest.fixture
def row_groups_read(monkeypatch):
    read, original = [], pq.ParquetFile.read_row_group

    def counting(self, group, *args, **kwargs):
        read.append(group)
        return original(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    return read


def source_of(tmp_path, num_rows=96, row_group_size=6):
    row = {"image": encoded(), "captions": '{"c": "x"}'}
    write_parquet(tmp_path / "data" / "0.parquet", [row] * num_rows, row_group_size)
    return build_group(tmp_path, "t2i_pretrain", {"data_dir": "data"}).source


def test_streams_that_take_turns_do_not_read_a_row_group_again(tmp_path, row_groups_read):
    """Each is in the middle of a row group of its own."""
    source = source_of(tmp_path)
    source.expect_streams(8)
    cursors = [GroupCursor(SourceGroup("g", source), stream, 8) for stream in range(8)]
    for _ in range(12):
        for cursor in cursors:
            source.plan(*cursor.advance())
    assert sorted(row_groups_read) == list(range(16))


def test_shares_that_end_within_a_row_group_read_it_once_each_at_most(tmp_path, row_groups_read):
    source = source_of(tmp_path, 96, 11)
    source.expect_streams(4)
    cursors = [GroupCursor(SourceGroup("g", source), stream, 4) for stream in range(4)]
    for _ in range(24):
        for cursor in cursors:
            source.plan(*cursor.advance())
    assert len(row_groups_read) <= 9 + 3


def test_a_row_group_of_which_all_was_read_is_not_kept(tmp_path, monkeypatch):
    tables, original = [], pq.ParquetFile.read_row_group

    def watching(self, *args, **kwargs):
        table = original(self, *args, **kwargs)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watching)
    write_parquet(tmp_path / "0.parquet", [{"caption": "x"}] * 12, 6)
    rows = ParquetRows([tmp_path / "0.parquet"], ["caption"])
    for row in range(8):
        rows.read(row)
    assert [table() is None for table in tables] == [True, False]
