"""Groups drawn by samples, by tokens, by fixed shares and by step: shares are met, and depend on nothing else."""

import dataclasses
import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.choosing import shares_at
from echo4o.data.errors import DataError
from echo4o.data.mixture import Mixture
from echo4o.data.weights import WeightEntry, WeightSchedule
from tests.data.fake_source import group
from tests.data.test_loader import composer, loader, sizes
from tests.data.test_resume import LAYOUTS_OF, Run

LIMIT = 60


def by_tokens(*args, **fields):
    return dataclasses.replace(group(*args), weight_by="tokens", **fields)


def scheduled(name, row_sizes, *entries, **fields):
    schedule = WeightSchedule(tuple(WeightEntry(*entry) for entry in entries))
    return dataclasses.replace(group(name, row_sizes, schedule.at(0)), schedule=schedule, **fields)


def replayed(name, row_sizes, share, **fields):
    return dataclasses.replace(group(name, row_sizes, 0.0), replay_share=share, **fields)


def mixture(groups, seed=7):
    return Mixture(groups, 0, 1, seed, LIMIT)


def drawn(stream, num_draws):
    """Name and tokens of each row."""
    for _ in range(num_draws):
        row = stream.next_row()
        stream.count_tokens(row, row.plan.num_tokens)
        yield row.group, row.plan.num_tokens


def shares(stream, num_draws):
    """Shares of the samples and of the tokens."""
    samples, tokens = Counter(), Counter()
    for name, num_tokens in drawn(stream, num_draws):
        samples[name] += 1
        tokens[name] += num_tokens
    return (
        {name: count / num_draws for name, count in samples.items()},
        {name: count / tokens.total() for name, count in tokens.items()},
    )


# --- by samples -----------------------------------------------------------------------------------------------------


def test_by_samples_the_draws_are_those_they_always_were():
    """Independent of everything but (data_seed, consumer, draw): the formula of every earlier checkpoint."""
    weights = {"a": 2.0, "b": 0.7, "c": 0.3}
    stream = Mixture([group(name, [5] * 9, weight) for name, weight in weights.items()], 3, 5, 11, LIMIT)
    for number, (name, _) in enumerate(drawn(stream, 300)):
        identity = f"11\0003\0{number}".encode()
        place = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") / 2**64
        assert name == ("a" if place < 2 / 3 else "b" if place < 2 / 3 + 0.7 / 3 else "c")
    assert set(stream.state_dict()) == {"draws", "groups", "ledger"}


def test_replay_takes_its_share_whatever_the_weights():
    for weights in ((1, 1), (1000, 1), (0.001, 0)):
        groups = [group("a", [9], weights[0]), group("b", [9], weights[1]), replayed("t2i", [30], 0.1)]
        samples, _ = shares(mixture(groups), 4000)
        assert samples["t2i"] == pytest.approx(0.1, abs=0.02)
        assert samples["a"] == pytest.approx(0.9 * weights[0] / sum(weights), abs=0.03)


# --- by tokens ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, LIMIT), st.integers(4, LIMIT), st.integers(1, 50)), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_tokens_follow_the_weights_within_the_bound_at_every_draw(parts, seed):
    groups = [by_tokens(f"g{n}", [low, high], weight / 10) for n, (low, high, weight) in enumerate(parts)]
    wanted, tokens = shares_at(groups, 0), Counter()
    for name, num_tokens in drawn(mixture(groups, seed), 400):
        tokens[name] += num_tokens
        for each, share in wanted.items():
            assert abs(tokens[each] - share * tokens.total()) <= 2 * len(groups) * LIMIT


def test_tokens_are_shared_where_samples_would_not_be():
    groups = [by_tokens("long", [60], 1.0), by_tokens("short", [6], 1.0), replayed("t2i", [20], 0.2)]
    samples, tokens = shares(mixture([*groups[:2], dataclasses.replace(groups[2], weight_by="tokens")]), 4000)
    assert tokens == pytest.approx({"long": 0.4, "short": 0.4, "t2i": 0.2}, abs=0.01)
    assert samples["short"] > 0.7


def test_groups_by_samples_share_the_tokens_that_groups_by_tokens_leave():
    groups = [by_tokens("t", [60], 2.0), group("a", [4], 1.0), group("b", [40], 1.0)]
    samples, tokens = shares(mixture(groups), 6000)
    assert tokens["t"] == pytest.approx(0.5, abs=0.01)
    assert samples["a"] / samples["b"] == pytest.approx(1, abs=0.1)


def test_a_mandatory_group_beyond_its_share_leaves_the_others_theirs():
    groups = [by_tokens("m", [20] * 9, 0.1, True), by_tokens("a", [50] * 9, 2.0), by_tokens("b", [5] * 9, 1.0)]
    stream, tokens = composer(groups), Counter()
    for _ in range(300):
        for address, count in tokens_of(stream.next_batch()):
            tokens[address[0]] += count
    assert tokens["a"] / tokens["b"] == pytest.approx(2, abs=0.1)
    assert tokens["m"] / tokens.total() > 0.15


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60))
def test_the_state_continues_exactly(num_taken):
    def fresh():
        return mixture([by_tokens("a", sizes(7, 1)), by_tokens("b", sizes(11, 2), 0.3), group("c", sizes(5, 3))])

    stream, restored = fresh(), fresh()
    list(drawn(stream, num_taken))
    restored.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert list(drawn(stream, 40)) == list(drawn(restored, 40))


def test_accounts_begin_anew_where_the_state_has_none():
    stream = mixture([by_tokens("a", [9]), by_tokens("b", [9])])
    stream.load_state_dict(mixture([group("a", [9]), group("b", [9])]).state_dict())
    assert len(list(drawn(stream, 5))) == 5


# --- by step --------------------------------------------------------------------------------------------------------


def test_weights_by_step():
    schedule = WeightSchedule((WeightEntry(0, 4), WeightEntry(10, 1), WeightEntry(20, 3, True), WeightEntry(30, 0)))
    assert [schedule.at(step) for step in (0, 9, 10, 15, 20, 29, 30, 999)] == [4, 4, 1, 2, 3, 3, 0, 0]
    assert str(schedule) == "4, 1 from step 10, linearly to 3 at step 20, 0 from step 30"


@pytest.mark.parametrize("entries", [[], [(1, 1.0)], [(0, 1.0), (5, 2.0), (5, 3.0)], [(0, 1.0), (5, 2.0), (4, 3.0)]])
def test_wrong_schedules_are_refused(entries):
    with pytest.raises(ValueError, match="step 0|ascend"):
        WeightSchedule(tuple(WeightEntry(*entry) for entry in entries))


@pytest.mark.parametrize("weight_by", ["samples", "tokens"])
def test_from_its_step_on_a_group_of_weight_0_is_in_no_pack(weight_by):
    """Though rows that were drawn before still waited; they are not lost."""
    fields = {"weight_by": weight_by}
    groups = [
        scheduled("a", sizes(90, 1), (0, 1.0), (6, 0.0), (9, 1.0), **fields),
        scheduled("b", sizes(90, 2), (0, 0.0), (6, 1.0), **fields),
    ]
    run = [{address[0] for address in pack} for (pack,) in Run(lambda: groups).addresses(14)]
    assert run[:9] == [{"a"}] * 6 + [{"b"}] * 3
    assert set.union(*run[9:]) == {"a", "b"}


def test_rows_given_back_come_once_an_epoch_all_the_same():
    groups = [scheduled("a", sizes(30, 1), (0, 1.0), (3, 0.1), (6, 1.0)), group("b", sizes(30, 2))]
    run, seen = Run(lambda: groups), Counter()
    for step in run.addresses(40):
        for pack in step:
            seen.update(map(tuple, pack))
    assert max(seen.values()) == 1
    assert {index for name, epoch, index in seen if (name, epoch) == ("a", 0)} == set(range(30))


def test_shares_follow_the_weights_of_each_phase_by_tokens():
    """A change of weights is no debt to be made up for."""
    groups = [by_tokens("a", [20] * 50), scheduled("b", [40] * 50, (0, 0.0), (500, 1.0), weight_by="tokens")]
    stream, tokens = mixture(groups), Counter()
    for step in range(1000):
        stream.begin_pack(step, [])
        for name, num_tokens in drawn(stream, 2):
            tokens[name, step // 500] += num_tokens
    assert tokens["b", 0] == 0
    assert abs(tokens["a", 1] - tokens["b", 1]) <= 8 * LIMIT


def curriculum():
    return [
        scheduled("a", sizes(53, 1), (0, 2.0), (3, 0.0), (7, 1.0), weight_by="tokens"),
        scheduled("b", sizes(29, 2), (0, 0.5), (9, 3.0, True), weight_by="tokens"),
        dataclasses.replace(group("m", sizes(7, 3, 4, 20), 0.5, True), weight_by="tokens"),
        replayed("t2i", sizes(11, 4), 0.1, weight_by="tokens"),
    ]


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_kills_and_other_numbers_of_ranks_do_not_change_the_packs(data):
    packs_per_step = data.draw(st.sampled_from([1, 2, 4]))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    expected = Run(curriculum, 1, packs_per_step).addresses(sum(lengths))
    taken, states = [], None
    for length in lengths:
        run = Run(curriculum, *data.draw(st.sampled_from(LAYOUTS_OF[packs_per_step])))
        if states is not None:
            run.resume(states)
        taken += run.addresses(length)
        states = run.states()
        run.addresses(data.draw(st.integers(0, 2)))  # lost in the kill
    assert taken == expected


def test_workers_do_not_change_the_packs():
    expected = Run(curriculum, 1, 2).addresses(12)
    run = Run(curriculum, 1, 2, num_workers=2)
    try:
        assert run.addresses(12) == expected
    finally:
        for rank in run.ranks:
            rank.close()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.sampled_from([(1, 1), (1, 2), (3, 1), (1, 6)]), st.sampled_from([(1, 1), (2, 2), (5, 1)]))
def test_dealing_anew_keeps_accounts_and_steps(num_steps, before, now):
    run = Run(curriculum, *before)
    run.addresses(num_steps)
    states = run.states()
    resumed = Run(curriculum, *now).resume(states)
    assert {rank.layout.first_step for rank in resumed.ranks} == {0 if before == now else num_steps}
    assert accounts(resumed.states()) == pytest.approx(accounts(states))
    seen = Counter()
    for step in resumed.addresses(5):
        for pack in step:
            seen.update(map(tuple, pack))
    assert max(seen.values()) == 1


def accounts(states):
    total = Counter()
    for rank in states:
        for state in rank["streams"].values():
            total.update(state["mixture"].get("balances", {}))
    return dict(total)


@pytest.mark.parametrize("weight_by", ["samples", "tokens"])
def test_what_is_packed_follows_the_weights(weight_by):
    """Over all streams, dropout taken into account: the share of what is trained on."""
    groups = [
        dataclasses.replace(group("a", sizes(200, 1), 3.0, droppable_sizes=(20,)), weight_by=weight_by),
        dataclasses.replace(group("b", sizes(200, 2), 1.0), weight_by=weight_by),
    ]
    stream, found = loader(groups, packs_per_rank=2, max_num_tokens_per_sample=90), Counter()
    for _ in range(600):
        for address, num_tokens in tokens_of(next(stream)):
            found[address[0]] += num_tokens if weight_by == "tokens" else 1
    assert found["a"] / found.total() == pytest.approx(0.75, abs=0.02)


def tokens_of(batch):
    """(address, tokens) of each sample of a pack."""
    return list(zip(batch.sample_addresses, batch.sample_lens, strict=True))


def test_rows_given_back_are_counted_when_they_are_drawn_again():
    """So that the first packs of a phase follow its weights, however many rows of before waited."""
    groups = [by_tokens("a", [20] * 500), scheduled("b", [20] * 500, (0, 0.0), (1, 1.0), weight_by="tokens")]
    stream, tokens = composer(groups, max_buffer_size=40), Counter()
    assert {address[0] for address, _ in tokens_of(stream.next_batch())} == {"a"}
    for _ in range(40):
        for address, num_tokens in tokens_of(stream.next_batch()):
            tokens[address[0]] += num_tokens
    assert tokens["a"] / tokens.total() == pytest.approx(0.5, abs=0.06)
    assert sum(stream.state_dict()["mixture"]["balances"].values()) == pytest.approx(0)


def test_a_run_that_begins_its_data_anew_draws_by_the_weights_of_its_step():
    stream = loader(curriculum())
    stream.begin_at(4)
    assert all(address[0] != "a" for _ in range(3) for address in next(stream).sample_addresses)
    with pytest.raises(DataError, match="before the first pack"):
        stream.begin_at(4)


# --- what cannot be drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([group("a", [5]), replayed("r", [5], 0.7), replayed("s", [5], 0.5)], r"is 1\.2, more than 1 \(r 0\.7, s 0\.5"),
        ([group("a", [5]), replayed("r", [5], 1.0)], "nothing is left"),
        ([group("a", [5], 0.0), replayed("r", [5], 0.1)], "for the rest; add 'weight: 1'"),
        ([scheduled("a", [5], (0, 1.0), (9, 0.0))], "from step 9 on"),
        ([scheduled("a", [5], (0, 0.0), (9, 1.0))], "from step 0 on"),
        ([scheduled("a", [5], (0, 1.0), (9, 0.0)), replayed("r", [5], 0.1)], "at step 9 for the rest"),
        ([scheduled("a", [5], (0, 1.0), (9, -1.0))], "negative"),
    ],
)
def test_shares_that_cannot_be_met_are_refused(groups, message):
    with pytest.raises(DataError, match=message):
        mixture(groups)


def test_replay_alone_is_enough_if_it_takes_everything():
    samples, _ = shares(mixture([replayed("r", [5], 0.5), replayed("s", [5], 0.5), group("off", [5], 0.0)]), 200)
    assert set(samples) == {"r", "s"}


# --- on resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (scheduled("a", [5], (0, 1.0), (9, 2.0)), "weight of group a was 1 and is weight 1, 2 from step 9 now"),
        (by_tokens("a", [5]), "weight of group a was 1 and is weight 1 by tokens now"),
    ],
)
def test_other_shares_are_logged_and_go_on(now, message, caplog):
    before = loader([group("a", [5]), group("b", [5])])
    next(before)
    resumed = loader([now, group("b", [5])])
    resumed.load_state_dict({0: json.loads(json.dumps(before.state_dict()))}.__getitem__, 1)
    next(resumed)
    assert message in caplog.text


def test_other_rows_of_the_same_number_are_refused():
    def chosen(**subset):
        return [dataclasses.replace(group("a", [5] * 4), subset=subset)]

    split = {"validation": 0.1, "by": "row", "seed": 0}
    state = loader(chosen(split=split, use_split="train", max_rows=4)).state_dict()
    loader(chosen(split=split, use_split="train", max_rows=4)).load_state_dict({0: state}.__getitem__, 1)
    for changed, message in (
        ({"split": {**split, "seed": 1}, "use_split": "train", "max_rows": 4}, "split of group a was"),
        (
            {"split": split, "use_split": "validation", "max_rows": 4},
            "use_split of group a was train and is validation",
        ),
        ({"split": split, "use_split": "train"}, "max_rows of group a was 4 and is not set"),
    ):
        with pytest.raises(DataError, match=message):
            loader(chosen(**changed)).load_state_dict({0: state}.__getitem__, 1)
