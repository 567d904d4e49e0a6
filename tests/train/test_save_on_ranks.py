"""A rank that fails in a save takes no part of a later one with it."""

from __future__ import annotations

from pathlib import Path

from tests.train.launch import launch


def test_what_one_rank_did_not_foresee_fails_the_save_on_all_and_only_this_one(tmp_path: Path) -> None:
    found = launch(2, "tests.train.save_process:run", str(tmp_path))
    for rank in found:
        assert "unforeseen" in rank["first"] and "rank 0" in rank["first"]
        assert rank["second"] == "None" and rank["steps"] == [2]
    assert found[0]["num_same"] == found[0]["num_tensors"] > 20
