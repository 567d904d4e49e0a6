"""The results of a folder: ranks that end in any order, runs that were killed, and two runs at once."""

import json

import pytest

from echo4o.generate.results import Results


def lines(folder):
    return [json.loads(line)["id"] for line in (folder / "results.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_last_rank_reports_for_all(tmp_path):
    order = ["a", "b", "c", "d"]
    with Results(tmp_path, 0, 2) as first, Results(tmp_path, 1, 2) as second:
        second.add({"id": "b"})
        second.add({"id": "d", "error": "no"})
        assert second.finish(order, {"d": "no"}, 1) is None
        assert lines(tmp_path) == ["b", "d"]
        first.add({"id": "c"})
        first.add({"id": "a"})
        assert first.finish(order, {}, 2) == {"num_done": 3, "failed": {"d": "no"}}
    assert lines(tmp_path) == order
    assert files(tmp_path) == ["results.jsonl"]


def test_ranks_of_a_killed_run_do_not_count(tmp_path):
    """Rank 1 was through, rank 0 was killed: in the next run both have to end."""
    with Results(tmp_path, 1, 2) as second:
        assert second.finish([], {"x": "old"}, 0) is None
    with Results(tmp_path, 0, 2) as first, Results(tmp_path, 1, 2) as second:
        assert first.finish([], {}, 0) is None
        assert second.finish([], {}, 0) == {"num_done": 0, "failed": {}}


def test_fewer_ranks_take_over_what_more_have_left(tmp_path):
    for rank in range(3):
        with Results(tmp_path, rank, 3) as results:
            results.add({"id": str(rank)})  # killed before its end
    with Results(tmp_path) as results:
        assert list(results.read()) == ["0", "1", "2"]
        assert results.finish(["2", "1", "0"], {}, 0) == {"num_done": 0, "failed": {}}
    assert lines(tmp_path) == ["2", "1", "0"]
    assert files(tmp_path) == ["results.jsonl"]


def test_a_running_rank_keeps_its_file(tmp_path):
    with Results(tmp_path, 0, 2) as first, Results(tmp_path, 1, 2) as second:
        second.add({"id": "b"})
        first.finish(["b"], {}, 0)
        assert files(tmp_path) == ["results.1.jsonl", "results.jsonl"]
        second.add({"id": "c"})
        second.finish(["b", "c"], {}, 2)
    assert lines(tmp_path) == ["b", "c"]


def test_what_a_killed_rank_has_left_is_older_than_what_follows(tmp_path):
    with Results(tmp_path, 3, 4, "first") as results:
        results.add({"id": "a", "seed": 1})
    with Results(tmp_path, 0, 4, "second") as results:
        results.add({"id": "a", "seed": 2})
        assert results.read()["a"]["seed"] == 2
    with Results(tmp_path) as results:
        assert results.read()["a"]["seed"] == 2


def test_a_run_that_another_has_replaced_speaks_for_itself(tmp_path):
    with Results(tmp_path, 1, 2, "first") as old, Results(tmp_path, 0, 2, "second") as new:
        assert old.finish([], {"x": "no"}, 1) == {"num_done": 1, "failed": {"x": "no"}}
        assert new.finish([], {}, 0) is None


def test_half_a_line_is_no_result(tmp_path):
    (tmp_path / "results.0.jsonl").write_text('{"id": "a"}\n{"id": "b", "fi')
    with Results(tmp_path) as results:
        assert list(results.read()) == ["a"]
        results.add({"id": "b"})
        results.finish(["a", "b"], {}, 1)
    assert lines(tmp_path) == ["a", "b"]


def test_newer_results_replace_older_ones(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"id": "old", "seed": 1}\n{"id": "a", "seed": 1}\n')
    with Results(tmp_path) as results:
        results.add({"id": "a", "seed": 2})
        assert results.read()["a"] == {"id": "a", "seed": 2}
        results.finish(["a"], {}, 1)
    assert lines(tmp_path) == ["a", "old"]  # no request any more, but its picture is there


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Results(tmp_path), pytest.raises(OSError, match="another run writes into"):
        Results(tmp_path).__enter__()
