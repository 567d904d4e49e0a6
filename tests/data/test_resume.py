"""Ranks, workers and restarts do not change which rows share a pack; another size of step loses no row."""

import itertools
import json
import logging
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.dealing import deal_anew, outstanding_rows
from echo4o.data.errors import DataError
from echo4o.data.resume import plan_resume
from echo4o.data.streams import StreamLayout, streams_per_pack
from tests.data.fake_source import group
from tests.data.test_loader import PACKER, loader, restarting, sizes


class Run:
    """The loaders of all ranks of a run, in one process."""

    def __init__(self, make_groups, world_size=1, packs_per_rank=1, **kwargs):
        self.ranks = [
            loader(make_groups(), PACKER, rank, world_size, packs_per_rank, **kwargs) for rank in range(world_size)
        ]
        self.packs_per_rank = packs_per_rank

    def step(self):
        """The packs of a step, in order of their slots."""
        return [next(rank) for rank in self.ranks for _ in range(self.packs_per_rank)]

    def addresses(self, num_steps):
        """Of the rows of each pack of each step."""
        return [[batch.sample_addresses for batch in self.step()] for _ in range(num_steps)]

    def states(self):
        return [json.loads(json.dumps(rank.state_dict())) for rank in self.ranks]

    def resume(self, states):
        for rank in self.ranks:
            rank.load_state_dict(states.__getitem__, len(states))
        return self

    def counters(self):
        return sum((Counter(rank.counters()) for rank in self.ranks), Counter())


def three_groups():
    return [
        group("a", sizes(53, 1), 2.0),
        group("b", sizes(29, 2), 1.0, bad_images=frozenset({5}), bad_rows=frozenset({7, 8})),
        group("m", sizes(7, 3, 4, 20), 0.5, True),
    ]


def few_rows():
    """Fewer rows than there are streams."""
    return [group("a", sizes(5, 1)), group("m", [6, 7], 0.0, True)]


LAYOUTS_OF = {number: [(w, number // w) for w in range(1, number + 1) if number % w == 0] for number in (1, 2, 4, 6)}

# --- layout ----------------------------------------------------------------------------------------------------------


def test_the_usual_numbers_of_workers_have_the_same_streams():
    assert [streams_per_pack(number) for number in (0, 1, 2, 3, 4, 5, 8)] == [4, 4, 4, 3, 4, 5, 8]


@pytest.mark.parametrize(("world_size", "packs_per_rank"), LAYOUTS_OF[6])
def test_every_step_takes_the_same_streams_however_ranks_share_them(world_size, packs_per_rank):
    layouts = [StreamLayout(6, 4, packs_per_rank, rank) for rank in range(world_size)]
    for step in range(9):
        taken = [
            layout.stream_at(step * packs_per_rank + place) for layout in layouts for place in range(packs_per_rank)
        ]
        assert taken == [slot + 6 * (step % 4) for slot in range(6)]
    assert sorted(stream for layout in layouts for stream in layout.own_streams) == list(range(24))


@pytest.mark.parametrize(
    ("packs_per_rank", "per_pack", "wanted", "number"),
    [(1, 4, 0, 0), (1, 4, 3, 2), (1, 4, 8, 4), (2, 4, 8, 8), (3, 4, 5, 4), (3, 4, 7, 6), (1, 7, 4, 1)],
)
def test_workers_share_streams_equally(packs_per_rank, per_pack, wanted, number):
    assert StreamLayout(packs_per_rank, per_pack, packs_per_rank, 0).num_workers(wanted) == number


def test_fewer_workers_than_wanted_are_noted(caplog):
    state = loader(three_groups()).state_dict()
    with loader(three_groups(), num_workers=3) as stream:
        stream.load_state_dict({0: state}.__getitem__, 1)
        next(stream)
    assert "2 of num_workers 3 are started" in caplog.text


# --- as many packs a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_groups", [three_groups, few_rows])
def test_packs_of_a_step_depend_on_no_rank_or_worker(make_groups):
    expected = Run(make_groups, 1, 4).addresses(9)
    for world_size, packs_per_rank in LAYOUTS_OF[4]:
        assert Run(make_groups, world_size, packs_per_rank).addresses(9) == expected


@pytest.mark.parametrize(("num_workers", "world_size", "packs_per_rank"), [(2, 1, 2), (4, 2, 1)])
def test_worker_processes_on_several_ranks_too(num_workers, world_size, packs_per_rank):
    expected = Run(three_groups, 1, 2).addresses(7)
    run = Run(three_groups, world_size, packs_per_rank, num_workers=num_workers)
    try:
        assert run.addresses(7) == expected
    finally:
        for rank in run.ranks:
            rank.close()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_kills_and_other_numbers_of_ranks_do_not_change_the_packs(data):
    packs_per_step = data.draw(st.sampled_from([1, 2, 4, 6]))
    make_groups = data.draw(st.sampled_from([three_groups, few_rows]))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    expected = Run(make_groups, 1, packs_per_step).addresses(sum(lengths))
    taken, states = [], None
    for length in lengths:
        run = Run(make_groups, *data.draw(st.sampled_from(LAYOUTS_OF[packs_per_step])))
        if states is not None:
            run.resume(states)
        taken += run.addresses(length)
        states = run.states()
        run.addresses(data.draw(st.integers(0, 2)))  # lost in the kill
    assert taken == expected


def test_counters_go_on_on_another_number_of_ranks():
    whole = Run(three_groups, 1, 4)
    whole.addresses(7)
    run = Run(three_groups, 2, 2)
    run.addresses(4)
    resumed = Run(three_groups, 4, 1).resume(run.states())
    assert resumed.counters() == run.counters()
    resumed.addresses(3)
    assert resumed.counters() == whole.counters()


def test_the_number_of_streams_is_that_of_the_checkpoint():
    with loader(three_groups(), num_workers=3) as stream:
        state = [next(stream) for _ in range(4)] and stream.state_dict()
        expected = [next(stream).sample_rows for _ in range(6)]
    restored = loader(three_groups(), num_workers=0)
    restored.load_state_dict({0: state}.__getitem__, 1)
    assert [next(restored).sample_rows for _ in range(6)] == expected
    assert restored.state_dict()["num_streams"] == 3


@pytest.mark.parametrize(
    ("before", "now", "needed"),
    [
        ((4, 1), (4, 1), [{0}, {1}, {2}, {3}]),
        ((4, 1), (2, 2), [{0, 1}, {2, 3}]),
        ((2, 3), (3, 2), [{0}, {0, 1}, {1}]),
        ((1, 4), (4, 1), [{0}] * 4),
    ],
)
def test_only_the_states_that_are_needed_are_read(before, now, needed):
    states = Run(three_groups, *before).states()
    for rank, expected in zip(Run(three_groups, *now).ranks, needed, strict=True):
        read = []
        rank.load_state_dict(lambda number, read=read: read.append(number) or states[number], len(states))
        assert set(read) == expected and len(read) == len(expected)


def test_in_the_middle_of_a_step_the_same_ranks_go_on_and_others_are_refused():
    stream = loader(three_groups(), packs_per_rank=2)
    for _ in range(3):
        next(stream)
    state = stream.state_dict()
    expected = [next(stream).sample_rows for _ in range(5)]
    same = loader(three_groups(), packs_per_rank=2)
    same.load_state_dict({0: state}.__getitem__, 1)
    assert [next(same).sample_rows for _ in range(5)] == expected
    with pytest.raises(DataError, match=r"middle of a step.*--resume_data False"):
        Run(three_groups, 2, 1).resume([state])


def test_files_of_another_run_are_refused():
    states = Run(three_groups, 2).states()
    with pytest.raises(DataError, match=r"mixed up.*--resume_data False"):
        Run(three_groups, 2).resume(states[::-1])


# --- another number of packs a step: dealt anew ----------------------------------------------------------------------


def left_of(source_group, states):
    """Addresses of the rows that the states have begun an epoch of and not delivered, and the epochs begun."""
    streams = {int(stream): state for rank in states for stream, state in rank["streams"].items()}
    source = source_group.source
    rest = outstanding_rows(source_group.name, len(source), streams, states[0]["num_streams"])
    rows = [(source.name, epoch, index) for epoch, index in rest.returned]
    for epoch, start, stop in rest.spans:
        rows += [(source.name, epoch, source.row_index(epoch, position)) for position in range(start, stop)]
    return rows, rest.epoch


def assert_nothing_lost(make_groups, delivered, states):
    """Every row of every epoch begun was delivered, is left, or is one that no pack can hold: exactly once."""
    seen = Counter(delivered)
    for source_group in make_groups():
        left, epochs = left_of(source_group, states)
        seen.update(left)
        source = source_group.source
        unusable = source.bad_rows | source.bad_images
        for epoch, index in itertools.product(range(epochs), range(len(source))):
            times = seen.pop((source.name, epoch, index), 0)
            assert times == 1 or (index in unusable and times == 0), (source.name, epoch, index, times)
    assert not seen, "no row of an epoch that was not begun"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_row_is_lost_or_repeated_whatever_the_size_of_steps(data):
    make_groups = data.draw(st.sampled_from([three_groups, few_rows]))
    delivered, states, counters = [], None, None
    for length in data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=5)):
        world_size, packs_per_rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
        run = Run(make_groups, world_size, packs_per_rank, max_bad_row_share=0.9)
        if states is not None:
            run.resume(states)
            assert run.counters() == counters
        delivered += [tuple(row) for step in run.addresses(length) for pack in step for row in pack]
        for rank in run.ranks[: data.draw(st.integers(0, 1))]:  # also killed in the middle of a step
            delivered += [tuple(row) for row in next(rank).sample_addresses]
        states, counters = run.states(), run.counters()
        if states[0]["num_batches"] % packs_per_rank or len({state["num_batches"] for state in states}) > 1:
            run, states = whole_step(run, delivered)
            counters = run.counters()
        assert_nothing_lost(make_groups, delivered, states)
        accounted = counters["samples"] + counters["too_long"] + counters["bad_rows"] + counters["buffered"]
        assert accounted == counters["rows"]


def whole_step(run, delivered):
    """Take what is missing of the step that only some ranks have finished."""
    most = max(-(-rank.num_batches // run.packs_per_rank) for rank in run.ranks) * run.packs_per_rank
    for rank in run.ranks:
        while rank.num_batches < most:
            delivered += [tuple(row) for row in next(rank).sample_addresses]
    return run, run.states()


def test_a_step_that_was_not_finished_can_be_dealt_anew():
    run = Run(three_groups, 2, 2)
    delivered = [row for step in run.addresses(3) for pack in step for row in pack]
    delivered += next(run.ranks[0]).sample_addresses
    resumed = Run(three_groups, 3, 1).resume(run.states())
    delivered += [row for step in resumed.addresses(5) for pack in step for row in pack]
    assert_nothing_lost(three_groups, delivered, resumed.states())


def test_what_is_left_is_dealt_equally_and_logged_once(caplog):
    run = Run(lambda: [group("a", [9] * 500), group("b", [9] * 300)], 2, 2)
    run.addresses(4)
    with caplog.at_level(logging.INFO):
        resumed = Run(lambda: [group("a", [9] * 500), group("b", [9] * 300)], 3, 1).resume(run.states())
    assert caplog.text.count("dealt anew") == 1 and "3 packs a step instead of 4" in caplog.text
    streams = [state for rank in resumed.states() for state in rank["streams"].values()]
    assert len(streams) == 12 and not any(state["buffer"] for state in streams)
    for name in ("a", "b"):
        cursors = [state["mixture"]["groups"][name] for state in streams]
        amounts = [
            len(cursor.get("returned", [])) + sum(stop - start for _, start, stop in cursor["spans"])
            for cursor in cursors
        ]
        assert max(amounts) - min(amounts) <= 1


def test_groups_that_do_not_resume_begin_anew_while_others_are_dealt():
    def make_groups():
        return [group("a", [9] * 90), restarting("b", [9] * 90)]

    run = Run(make_groups, 1, 2)
    taken = {row for step in run.addresses(3) for pack in step for row in pack}
    resumed = Run(make_groups, 1, 1).resume(run.states())
    beginnings = [state["mixture"]["groups"]["b"] for state in resumed.states()[0]["streams"].values()]
    assert beginnings == [{"rows": 90, "epoch": 0, "spans": []}] * 4
    rows = [row for step in resumed.addresses(9) for pack in step for row in pack]
    assert len(set(rows)) == len(rows)
    assert not {row for row in rows if row[0] == "a"} & taken
    assert {row for row in rows if row[0] == "b"} & taken


def test_a_run_that_was_saved_before_its_first_pack_is_dealt_from_the_beginning():
    resumed = Run(three_groups, 1, 3).resume(Run(three_groups, 2, 1).states())
    assert resumed.addresses(5) == Run(three_groups, 1, 3).addresses(5)


def test_a_stream_that_lags_behind_keeps_its_shares_of_the_epochs_that_others_began():
    """Stream 0 of 2 has begun three epochs, the other none."""
    ledger = {"rows": 3, "good": 3, "too_long": 0, "bad": {}}
    ahead = {"rows": 4, "epoch": 3, "spans": [[2, 1, 2]]}
    state = {
        "mixture": {"draws": 5, "groups": {"a": ahead}, "ledger": ledger},
        "buffer": [["a", ["a", 1, 3], 0]],
        "held_back": [],
        "packed": [1, 3, 30],
    }
    deal = deal_anew({0: state}, {0: {"rows": 3}}, 2, 3, {"a": 4})
    rest = deal.outstanding["a"]
    assert rest.epoch == 3 and rest.returned == [[1, 3]]
    assert rest.spans == [[0, 2, 4], [1, 0, 2], [2, 1, 4]]
    groups = [deal.state(stream)["mixture"]["groups"]["a"] for stream in range(3)]
    assert [len(g.get("returned", [])) + sum(stop - start for _, start, stop in g["spans"]) for g in groups] == [
        3,
        3,
        2,
    ]
    assert all(g["epoch"] == 3 for g in groups)


# --- the size of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "packs_per_rank", "keep", "expected", "note"),
    [
        (4, 1, True, 1, ""),
        (2, 1, True, 2, "4 packs a step as before: gradient_accumulation_steps 1 → 2 on 2 ranks"),
        (1, 1, True, 4, "4 packs a step as before: gradient_accumulation_steps 1 → 4 on 1 rank"),
        (2, 2, True, 2, "4 packs a step as before, on 4 → 2 ranks"),
        (3, 1, True, 1, "3 packs a step.*another size"),
        (8, 1, True, 1, "8 packs a step.*another size"),
        (2, 1, False, 1, "2 packs a step instead of 4"),
        (4, 1, False, 1, ""),
    ],
)
def test_steps_stay_as_large_where_they_can(world_size, packs_per_rank, keep, expected, note):
    state = {"packs_per_step": 4, "world_size": 4}
    number, text = plan_resume(state, world_size, packs_per_rank, keep)
    assert number == expected
    assert re.fullmatch(note, text) if not note else re.match(note, text)


def test_a_state_of_an_earlier_version_changes_no_setting():
    assert plan_resume({"version": 2, "world_size": 4}, 2, 3, True) == (3, "")


def test_the_test_runs_pack_several_rows():
    """Otherwise which rows share a pack would say little."""
    packs = [pack for step in Run(three_groups, 1, 4).addresses(9) for pack in step]
    assert sum(map(len, packs)) / len(packs) > 2
