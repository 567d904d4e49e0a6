"""Shares of the epochs, group proportions, and what happens to rows that cannot be used."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.errors import DataError, RowError
from echo4o.data.mixture import GroupCursor, Mixture
from tests.data.fake_source import group


def mixture(groups, consumer=0, num_consumers=1, limit=1000, **kwargs):
    return Mixture(groups, consumer, num_consumers, 7, limit, **kwargs)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3))
def test_every_row_exactly_once_an_epoch(num_rows, num_consumers, num_epochs):
    """Over all consumers, also with fewer rows than consumers and without dropping a remainder."""
    source_group = group("a", [5] * num_rows)
    read = Counter()
    for consumer in range(num_consumers):
        cursor = GroupCursor(source_group, consumer, num_consumers)
        while (place := cursor.advance())[0] < num_epochs:
            read[place] += 1
    assert read == {(epoch, position): 1 for epoch in range(num_epochs) for position in range(num_rows)}


def test_shares_are_contiguous_spans():
    cursors = [GroupCursor(group("a", [5] * 10), consumer, 3) for consumer in range(3)]
    shares = [[cursor.advance() for _ in range(3)] for cursor in cursors]
    assert shares[0] == [(0, 0), (0, 1), (0, 2)]
    assert shares[1] == [(0, 3), (0, 4), (0, 5)]
    assert shares[2] == [(0, 6), (0, 7), (0, 8)]
    assert cursors[2].state_dict() == {"rows": 10, "epoch": 1, "spans": [[0, 9, 10]]}


def test_spans_of_several_epochs_can_be_dealt_out():
    """What a re-sharded consumer gets: spans of other consumers, then its own shares from a later epoch on."""
    cursor = GroupCursor(group("a", [5] * 4), 0, 2)
    cursor.load_state_dict({"rows": 4, "epoch": 2, "spans": [[0, 3, 4], [1, 0, 1]]})
    assert [cursor.advance() for _ in range(4)] == [(0, 3), (1, 0), (2, 0), (2, 1)]


def test_more_consumers_than_rows_never_hangs():
    rows = [mixture([group("a", [5])], consumer, 4).next_row().plan.address.epoch for consumer in range(4)]
    assert sorted(rows) == [0, 1, 2, 3]


def test_proportions_follow_the_weights_of_usable_rows():
    """Too long rows of one group do not shift the mixture towards the others."""
    groups = [group("a", [5, 5000], weight=1.0), group("b", [5] * 30, weight=3.0), group("off", [5], weight=0.0)]
    stream = mixture(groups)
    drawn = Counter(stream.next_row().group for _ in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert drawn["b"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_choice_depends_on_seed_consumer_and_draw_only():
    groups = [group("a", [5] * 9), group("b", [5] * 9)]

    def choices(consumer, seed):
        stream = Mixture(groups, consumer, 4, seed, 1000)
        return [stream.next_row().group for _ in range(40)]

    assert choices(0, 7) == choices(0, 7)
    assert len({tuple(choices(consumer, seed)) for consumer in (0, 1) for seed in (7, 8)}) == 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40))
def test_state_continues_exactly(num_taken):
    def fresh():
        return mixture([group("a", [5] * 7, bad_rows=frozenset({3})), group("b", [5] * 11)], 1, 2, max_bad_row_share=1)

    stream, restored = fresh(), fresh()
    for _ in range(num_taken):
        stream.next_row()
    restored.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    following = [[s.next_row().plan.address for _ in range(30)] for s in (stream, restored)]
    assert following[0] == following[1]
    assert stream.ledger.counters() == restored.ledger.counters()


def test_bad_rows_are_counted_by_reason_and_logged_with_their_place(caplog):
    stream = mixture([group("a", [5] * 100, bad_rows=frozenset({3, 4}))])
    with caplog.at_level(logging.WARNING):
        for _ in range(98):
            stream.next_row()
    assert stream.ledger.counters() == {"rows": 100, "too_long": 0, "bad_rows": 2, "bad: no instruction": 2}
    assert "a:3: no instruction" in caplog.text


def test_logging_is_sparing(caplog):
    stream = mixture([group("a", [5] * 2000, bad_rows=frozenset(range(0, 2000, 2)))], max_bad_row_share=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            stream.next_row()
    assert stream.ledger.bad.total() >= 900
    assert len(caplog.records) <= 8


def test_too_many_bad_rows_stop_the_run_with_a_summary():
    stream = mixture([group("a", [5] * 300, bad_rows=frozenset(range(60)))])
    with pytest.raises(DataError, match=r"no instruction.*\n.*\n.*--max_bad_row_share"):
        for _ in range(300):
            stream.next_row()


def test_few_rows_are_judged_after_one_epoch():
    stream = mixture([group("a", [5] * 6, bad_rows=frozenset({0, 1, 2}))])
    with pytest.raises(DataError, match=r"of \d rows"):
        for _ in range(10):
            stream.next_row()


def in_file_order(num_rows, bad_rows):
    return group("a", [5] * num_rows, bad_rows=frozenset(bad_rows), orders={0: np.arange(num_rows)})


def test_a_clump_of_bad_rows_met_early_is_no_reason_to_stop():
    """One unreadable file of many: 4.5 % of the rows, though most of those read so far."""
    stream = mixture([in_file_order(2000, range(10, 100))])
    for _ in range(1900):
        stream.count_decoded(stream.next_row())
    assert stream.ledger.bad.total() == 90


def test_the_share_is_judged_after_a_thousand_rows():
    stream = mixture([in_file_order(5000, range(400, 900))])
    for _ in range(499):
        stream.count_decoded(stream.next_row())
    row = stream.next_row()
    assert stream.ledger.num_rows == 1000
    with pytest.raises(DataError, match="501 of 1000 rows"):
        stream.count_undecodable(row, RowError("image truncated"))


def test_a_run_whose_every_row_fails_stops_early():
    with pytest.raises(DataError, match="100 of 100 rows"):
        mixture([group("a", [5] * 5000, bad_rows=frozenset(range(5000)))]).next_row()


def test_the_share_of_a_small_consumer_is_judged_after_its_part_of_an_epoch():
    groups = [group("a", [5] * 2400), group("off", [5] * 900, weight=0.0)]
    assert mixture(groups, 1, 3).ledger.min_rows == 800


def test_too_long_rows_are_not_bad_and_name_the_setting(caplog):
    stream = mixture([group("a", [5, 60, 60])], limit=50)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            stream.next_row()
    counters = stream.ledger.counters()
    assert counters["too_long"] > 5 and counters["bad_rows"] == 0
    assert "max_num_tokens_per_sample 60" in caplog.text


@pytest.mark.parametrize("num_consumers", [1, 3])
def test_only_too_long_rows_is_an_error_and_no_hang(num_consumers):
    stream = mixture([group("a", [5]), group("b", [60] * 20, weight=5.0)], 0, num_consumers, limit=50)
    with pytest.raises(DataError, match="group b .*20 × too_long|max_num_tokens_per_sample is 50"):
        for _ in range(50):
            stream.next_row()


def test_only_bad_rows_is_an_error_even_if_all_may_be_bad():
    with pytest.raises(DataError, match="group a"):
        mixture([group("a", [5] * 4, bad_rows=frozenset(range(4)))], max_bad_row_share=1).next_row()


@pytest.mark.parametrize(
    ("sizes", "bad_rows", "advice"),
    [
        ([5] * 4, {0, 1, 2, 3}, {"dataset_info"}),
        ([60] * 4, set(), {"max_num_tokens_per_sample"}),
        ([60] * 4, {0, 1}, {"dataset_info", "max_num_tokens_per_sample"}),
    ],
)
def test_the_advice_fits_the_cause(sizes, bad_rows, advice):
    with pytest.raises(DataError, match="none of 4 rows") as failure:
        mixture([group("a", sizes, bad_rows=frozenset(bad_rows))], limit=50, max_bad_row_share=1).next_row()
    assert {word for word in ("dataset_info", "max_num_tokens_per_sample") if word in str(failure.value)} == advice


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "weight"),
        ([group("a", [5], weight=0.0)], "weight: 1"),
        ([group("a", [5], weight=-1.0)], "negative"),
        ([group("a", [])], "no rows"),
        ([group("a", [5]), group("a", [6])], "differ"),
    ],
)
def test_unusable_groups_are_refused(groups, message):
    with pytest.raises(DataError, match=message):
        mixture(groups)


def test_changed_data_are_noticed_on_resume():
    state = mixture([group("a", [5] * 3)]).state_dict()
    with pytest.raises(DataError, match=r"had 3 rows.*--resume_data False"):
        mixture([group("a", [5] * 4)]).load_state_dict(state)
    with pytest.raises(DataError, match=r"dataset YAML.*--resume_data False"):
        mixture([group("b", [5] * 3)]).load_state_dict(state)
