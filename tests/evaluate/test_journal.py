"""The file of judgements: whole lines whatever happens, one writer, the latest line of a question counts."""

import json
import threading
from pathlib import Path

import pytest

from echo4o.evaluate.benchmark import Judgement
from echo4o.evaluate.journal import Journal, JournalError, read_judgements


def judgement(item: str = "1", **changed) -> Judgement:
    return Judgement("geneval++", item, "verdict", **{"status": "ok", "answer": {"correct": 1}, **changed})  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "judgements.jsonl"


def test_lines_come_back_in_order(path):
    first, second = judgement(text="réponse\n“1”"), judgement(text="again \ud800", status="parse_error", answer=None)
    with Journal(path) as journal:
        journal.add(first)
        assert read_judgements(path) == {("1", "verdict"): [first]}  # at once, not at the end
        journal.add(second)
    with Journal(path) as journal:
        assert [one.status for one in journal.known["1", "verdict"]] == ["ok", "parse_error"]
        assert journal.known["1", "verdict"][0] == first


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_removed(path, cut):
    with Journal(path) as journal:
        journal.add(judgement("1"))
        journal.add(judgement("2"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert set(read_judgements(path)) == {("1", "verdict")}
    with Journal(path) as journal:
        whole = cut == 1  # only the end of the line was missing
        assert set(journal.known) == {("1", "verdict"), ("2", "verdict")} if whole else {("1", "verdict")}
        journal.add(judgement("3"))
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == ["1", *["2"] * whole, "3"]


def test_a_damaged_line_is_named(path):
    with Journal(path) as journal:
        journal.add(judgement())
    path.write_bytes(b"{broken}\n" + path.read_bytes())
    with pytest.raises(JournalError, match="line 1: no judgement"), Journal(path):
        pass
    path.write_bytes(b'{"item": "1"}\n')
    with pytest.raises(JournalError, match="line 1"):
        read_judgements(path)


def test_two_evaluations_do_not_write_into_one_file(path):
    with Journal(path), pytest.raises(JournalError, match="another evaluation"), Journal(path):
        pass
    with Journal(path) as journal:  # free again, also after an error
        journal.add(judgement())


def test_many_threads_write_whole_lines(path):
    with Journal(path) as journal:
        threads = [
            threading.Thread(
                target=lambda n=n: [journal.add(judgement(f"{n}-{i}", text="x" * 9000)) for i in range(20)]
            )
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_judgements(path)) == 160


def test_no_file_is_no_judgement(path):
    assert read_judgements(path) == {}
