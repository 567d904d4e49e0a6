"""Composition of packs, exact resumption, worker processes."""

import dataclasses
import itertools
import json
import random
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.composition import MAX_PASSES, PATIENCE, BatchComposer, best_fit
from echo4o.data.errors import DataError
from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.mixture import Mixture
from echo4o.data.packing import Packer, PackingConfig
from tests.data.fake_source import PACKER, group

LIMITS = {"expected_num_tokens": 90, "max_num_tokens": 100, "max_num_tokens_per_sample": 60, "max_buffer_size": 8}


def config(**kwargs):
    return LoaderConfig(**{**LIMITS, "prefer_buffer_before": 50, "num_workers": 0, "worker_timeout": 60, **kwargs})


def loader(groups, packer=PACKER, rank=0, world_size=1, packs_per_rank=1, **kwargs):
    return PackedLoader(groups, packer, config(**kwargs), rank, world_size, packs_per_rank)


def composer(groups, **kwargs):
    """A stream by itself."""
    limits = config(**kwargs)
    return BatchComposer(Mixture(groups, 0, 1, 42, limits.max_num_tokens_per_sample), PACKER, limits)


def saved(stream):
    """The state of a loader as a checkpoint gives it back."""
    return json.loads(json.dumps(stream.state_dict()))


def resume(stream, state):
    """From the checkpoint of a run of one rank."""
    stream.load_state_dict({0: state}.__getitem__, 1)
    return stream


def sizes(count, seed=0, low=4, high=60):
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(count)]


def groups():
    return [group("a", sizes(37, 1), 2.0), group("b", sizes(23, 2), 1.0, bad_images=frozenset({5}))]


def identity(batch):
    """All that must be equal for two batches to be the same."""
    return batch.sample_rows, batch.packed_text_ids.tolist(), batch.packed_position_ids.tolist()


# --- best fit --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 100), st.integers(0, 100))
def test_best_fit_is_optimal(items, capacity, first_below):
    chosen = best_fit(items, capacity, first_below)
    assert chosen == sorted(set(chosen))
    every = (sum(c) for n in range(len(items) + 1) for c in itertools.combinations(items, n))
    assert sum(items[i] for i in chosen) == max(total for total in every if total <= capacity)


def test_best_fit_prefers_early_items_below_the_threshold_and_late_ones_beyond():
    assert best_fit([5, 5, 5, 5], 10, first_below=100) == [0, 1]
    assert best_fit([5, 5, 5, 5], 10, first_below=0) == [2, 3]
    assert best_fit([5, 5, 5, 5], 10, first_below=3) == [0, 3]


# --- composition -----------------------------------------------------------------------------------------------------


def test_packs_keep_the_limits_and_lose_no_row():
    """Every row drawn is packed or still buffered; too long and bad ones are counted."""
    source = group("a", [*sizes(60), 61, 99], bad_images=frozenset({7}))
    stream = loader([source])
    packed = Counter()
    for batch in itertools.islice(stream, 80):
        batch.validate()
        assert batch.sequence_length <= 100
        packed.update(batch.sample_rows)
    assert max(packed.values()) == 1
    counters = stream.counters()
    accounted = len(packed) + counters["too_long"] + counters["bad_rows"] + counters["buffered"]
    assert accounted == counters["rows"] and counters["too_long"] > 2 and counters["bad_rows"] > 0
    buffers = [part["buffer"] for part in stream.state_dict()["streams"].values()]
    waiting = {tuple(address) for buffer in buffers for _, address, _ in buffer}
    rows_seen = {row.split("/")[1] for row in packed} | {f"{epoch}:{index}" for _, epoch, index in waiting}
    for epoch in (0, 1, 2):
        missing = {f"{epoch}:{index}" for index in range(62)} - rows_seen
        assert missing == {f"{epoch}:{index}" for index in (7, 60, 61)}


def test_no_row_waits_for_ever():
    """Two rows of 51 never fit together and are never the best fit; they go in all the same."""
    stream = composer([group("a", [*[50] * 40, 51, 52])])
    drawn_at, longest = {}, 0
    for number in range(120):
        held = {tuple(address): number for _, address, _ in stream.state_dict()["buffer"]}
        drawn_at = held | drawn_at
        for row in stream.next_batch().sample_rows:
            epoch, index = map(int, row.split("/")[1].split(":"))
            longest = max(longest, number - drawn_at.pop(("a", epoch, index), number))
    patience = PATIENCE * LIMITS["max_buffer_size"]
    assert patience - 1 <= longest <= patience + LIMITS["max_buffer_size"]


def test_a_pack_of_the_expected_length_is_emitted_at_once():
    stream = loader([group("a", [30] * 9)], expected_num_tokens=60, max_num_tokens=100)
    assert next(stream).sequence_length == 90  # best fit of what is buffered
    stream = loader([group("a", [30] * 9)], expected_num_tokens=60, max_num_tokens=100, max_buffer_size=1)
    assert next(stream).sequence_length == 60  # reached: nothing more is read


def test_small_rows_fill_a_pack_beyond_the_buffer_size():
    stream = loader([group("a", [3] * 50)], max_buffer_size=5)
    assert next(stream).sequence_length >= 90


@pytest.mark.parametrize("buffer_size", [0, 1, 2])
def test_tiny_buffers_work(buffer_size):
    stream = loader([group("a", sizes(30))], max_buffer_size=buffer_size)
    assert all(0 < next(stream).sequence_length <= 100 for _ in range(20))


def unconstrained_fill(row_sizes, num_packs, capacity, lookahead):
    """Mean fill of best fit over the same lookahead when no row has a right to be packed."""
    stream, buffer, total = iter(row_sizes), [], 0
    for _ in range(num_packs):
        buffer += list(itertools.islice(stream, lookahead - len(buffer)))
        chosen = set(best_fit(buffer, capacity))
        total += sum(buffer[i] for i in chosen)
        buffer = [size for i, size in enumerate(buffer) if i not in chosen]
    return total / num_packs / capacity


@pytest.mark.parametrize(("low", "high", "lookahead"), [(3000, 15000, 50), (6000, 16000, 20), (4000, 30000, 50)])
def test_fill_is_within_two_percent_of_the_best_fit_bound(low, high, lookahead):
    row_sizes = sizes(600, 3, low, high)
    limits = {"expected_num_tokens": 32768, "max_num_tokens": 36864, "max_num_tokens_per_sample": 36864}
    source = group("a", row_sizes)
    composer = BatchComposer(
        Mixture([source], 0, 1, 7, 36864),
        PACKER,
        config(**limits, max_buffer_size=lookahead, prefer_buffer_before=16384),
    )
    packs = [composer.next_batch().sequence_length for _ in range(60)]
    order = [row_sizes[i] for i in source.source.orders[0]]
    fill = sum(packs) / len(packs) / 36864
    assert fill >= 0.98 * unconstrained_fill(order, 60, 36864, lookahead)
    assert fill >= 0.95


@pytest.mark.parametrize("tells_segments", [True, False])
def test_dropped_segments_leave_no_gap(tells_segments):
    """A row's own dropout is known before it is decoded, so packs are as full with dropout as without."""
    packer = Packer(PackingConfig(1, 2, 3, 4, text_cond_dropout_prob=0.5))
    source = group("a", sizes(200, 4, 5, 20), droppable_sizes=(15, 15), tells_segments=tells_segments)
    stream = loader([source], packer, max_buffer_size=30)
    fill = sum(next(stream).sequence_length for _ in range(40)) / 40 / 100
    assert (fill > 0.97) == tells_segments


def test_every_pack_has_a_row_of_each_mandatory_group_and_weights_hold_for_the_rest():
    """As upstream: the mandatory row comes on top of the rows drawn by weight."""
    mixed = [group("m", [10] * 40, 1.0, True), group("a", sizes(50, 5, 5, 30), 3.0), group("n", [5] * 9, 0.0, True)]
    stream = loader(mixed)
    drawn = Counter()
    for batch in itertools.islice(stream, 400):
        names = Counter(batch.sample_names)
        assert names["m"] >= 1 and names["n"] == 1
        drawn.update(names)
    by_weight = drawn["m"] - 400, drawn["a"]
    assert by_weight[0] / sum(by_weight) == pytest.approx(0.25, abs=0.04)


def test_mandatory_groups_that_do_not_fit_together_take_turns():
    stream = loader([group("m", [60] * 5, 1.0, True), group("n", [60] * 5, 0.0, True)])
    held = Counter(name for batch in itertools.islice(stream, 20) for name in batch.sample_names)
    assert held["n"] >= 8 and held["m"] >= 8


def test_rows_that_never_fit_beside_a_mandatory_one_do_not_starve(caplog):
    stream = composer([group("m", [55] * 5, 0.0, True), group("a", [50] * 5, 1.0)], max_buffer_size=2)
    batches = [stream.next_batch() for _ in range(2 * (PATIENCE * 2 + MAX_PASSES + 1))]
    without = [batch for batch in batches if "m" not in batch.sample_names]
    assert len(without) == 2 and all(batch.sample_names == ["a", "a"] for batch in without)
    assert "max_num_tokens" in caplog.text


def test_rows_that_fail_to_decode_are_replaced():
    bad = frozenset(range(0, 40, 10))
    stream = loader([group("a", sizes(40), bad_images=bad)], max_bad_row_share=0.5)
    lengths = [next(stream).sequence_length for _ in range(30)]
    assert stream.counters()["bad: image truncated"] >= 4
    assert sum(lengths) / 30 >= 95


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_undecodable_rows_stop_the_run(num_workers):
    with (
        loader([group("a", [30] * 20, bad_images=frozenset(range(10)))], num_workers=num_workers) as stream,
        pytest.raises(DataError, match=r"image truncated") as failure,
    ):
        list(itertools.islice(stream, 50))
    assert "Traceback" not in str(failure.value)


@pytest.mark.parametrize("undecodable", [20, 12])
def test_no_decodable_row_is_an_error_and_no_hang_even_if_all_may_be_bad(undecodable):
    """Broken behind the header, alone or beside rows that already fail when they are planned."""
    source = group("a", [30] * 20, bad_images=frozenset(range(undecodable)), bad_rows=frozenset(range(undecodable, 20)))
    with pytest.raises(DataError, match=r"none of \d+ rows read in a row from group a.*image truncated"):
        next(loader([source], max_bad_row_share=1.0))


def test_one_decodable_row_among_many_is_enough():
    stream = loader([group("a", [30] * 20, bad_images=frozenset(range(19)))], max_bad_row_share=1.0)
    assert {row.split(":")[1] for _ in range(10) for row in next(stream).sample_rows} == {"19"}


def test_all_rows_too_long_is_an_error_and_no_hang():
    with pytest.raises(DataError, match="max_num_tokens_per_sample"):
        next(loader([group("a", [70] * 20)]))


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_taken", [0, 1, 4, 11])
def test_a_restored_stream_continues_exactly(num_workers, num_taken):
    """Though workers have prepared more batches than were taken, and the buffer holds rows."""
    with loader(groups(), num_workers=num_workers) as stream:
        for _ in range(num_taken):
            next(stream)
        state = saved(stream)
        expected = [identity(next(stream)) for _ in range(7)]
        counters = stream.counters()
    if num_taken > 3:
        assert all(len(part["buffer"]) > 0 for part in state["streams"].values())
    with resume(loader(groups(), num_workers=num_workers), state) as restored:
        assert [identity(next(restored)) for _ in range(7)] == expected
        assert restored.counters() == counters


@pytest.mark.parametrize("packs_per_rank", [1, 2])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_and_none_give_the_same_stream(num_workers, packs_per_rank):
    expected = [identity(b) for b in itertools.islice(loader(groups(), packs_per_rank=packs_per_rank), 11)]
    with loader(groups(), num_workers=num_workers, packs_per_rank=packs_per_rank) as stream:
        assert [identity(next(stream)) for _ in range(11)] == expected


def test_close_loses_nothing():
    with loader(groups(), num_workers=2) as stream:
        interrupted = [identity(next(stream)) for _ in range(3)]
        stream.close()
        interrupted += [identity(next(stream)) for _ in range(3)]
    with loader(groups(), num_workers=2) as stream:
        assert interrupted == [identity(next(stream)) for _ in range(6)]


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with loader(groups(), num_workers=1) as stream:
        next(stream)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(("world_size", "packs_per_rank", "num_workers"), [(1, 1, 0), (3, 1, 0), (2, 1, 2), (1, 2, 3)])
def test_every_row_exactly_once_an_epoch_over_all_streams(world_size, packs_per_rank, num_workers):
    seen = Counter()
    for rank in range(world_size):
        with loader(
            [group("a", sizes(31, 1), 2.0), group("b", sizes(17, 2), 1.0)],
            PACKER,
            rank,
            world_size,
            packs_per_rank,
            num_workers=num_workers,
        ) as stream:
            for batch in itertools.islice(stream, 150):
                seen.update(batch.sample_rows)
    for name, count in (("a", 31), ("b", 17)):
        for epoch in (0, 1):
            assert [seen[f"{name}/{epoch}:{index}"] for index in range(count)] == [1] * count


@pytest.mark.parametrize("version", [2, 99])
def test_a_state_of_another_version_is_refused(version):
    with pytest.raises(DataError, match=r"version(.|\n)*--resume_data False"):
        resume(loader(groups()), {**loader(groups()).state_dict(), "version": version})


@pytest.mark.parametrize(
    ("changed", "data_seed", "message"),
    [
        ([group("a", [9] * 5, 2.0), group("b", [9] * 4)], 43, "data_seed was 42 and is 43"),
        ([group("a", [9] * 6, 2.0), group("b", [9] * 4)], 42, "group a had 5 rows and has 6"),
        ([group("a", [9] * 5, 2.0)], 42, "group b is gone"),
        ([group("a", [9] * 5, 2.0), group("b", [9] * 4), group("c", [9])], 42, "group c is new"),
        ([group("a", [9] * 5, 2.0, True), group("b", [9] * 4)], 42, "is_mandatory of group a was False and is True"),
    ],
)
def test_other_data_are_refused_on_resume(changed, data_seed, message):
    stream = loader([group("a", [9] * 5, 2.0), group("b", [9] * 4)])
    next(stream)
    with pytest.raises(DataError, match=rf"{message}.*(.|\n)*--resume_data False"):
        resume(loader(changed, data_seed=data_seed), saved(stream))


def test_another_weight_is_logged_and_goes_on_without_losing_a_row(caplog):
    stream = loader([group("a", [9] * 30, 2.0), group("b", [9] * 30)])
    rows = list(next(stream).sample_rows)
    restored = resume(loader([group("a", [9] * 30, 0.5), group("b", [9] * 30)]), saved(stream))
    assert "the weight of group a was 2 and is 0.5 now" in caplog.text
    rows += [row for batch in itertools.islice(restored, 4) for row in batch.sample_rows]
    assert len(set(rows)) == len(rows)


def restarting(name, row_sizes, weight=1.0):
    return dataclasses.replace(group(name, row_sizes, weight), resume_data_status=False)


def test_a_group_that_does_not_resume_starts_at_its_beginning_with_none_of_its_rows_waiting():
    """The other group goes on."""

    def fresh(num_rows=90):
        return loader([group("a", [9] * 90), restarting("b", [9] * num_rows)])

    stream, restored = fresh(), fresh()
    taken = [row for batch in itertools.islice(stream, 4) for row in batch.sample_rows]
    state = saved(stream)
    assert any(waiting[0] == "b" for part in state["streams"].values() for waiting in part["buffer"])
    resume(restored, state)
    for stream_id, kept in restored.state_dict()["streams"].items():
        assert kept["buffer"] == [row for row in state["streams"][stream_id]["buffer"] if row[0] == "a"]
    rows = [row for batch in itertools.islice(restored, 9) for row in batch.sample_rows]
    assert len(set(rows)) == len(rows)
    assert not {row for row in rows if row.startswith("a/")} & set(taken)
    assert {row for row in rows if row.startswith("b/")} & set(taken)
    resume(fresh(80), state)


def test_close_does_not_restart_a_group_that_does_not_resume():
    stream = loader([restarting("a", [9] * 90)])
    rows = list(next(stream).sample_rows)
    stream.close()
    assert not set(rows) & set(next(stream).sample_rows)


def test_a_buffered_row_that_vanished_is_named():
    stream = loader([group("a", sizes(20))])
    next(stream)
    state = stream.state_dict()
    lost = frozenset({state["streams"]["0"]["buffer"][0][1][2]})
    restored = resume(loader([group("a", sizes(20), bad_rows=lost)], max_bad_row_share=1.0), state)
    with pytest.raises(DataError, match="Restore the data"):
        list(itertools.islice(restored, 4))


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_dead_worker_is_an_error_and_no_hang(num_workers):
    started = time.perf_counter()
    with (
        loader([group("a", [30] * 20, killers=frozenset(range(10)))], num_workers=num_workers) as stream,
        pytest.raises(DataError, match="--num_workers"),
    ):
        list(itertools.islice(stream, 50))
    assert time.perf_counter() - started < 30


def test_timings_and_counters_cover_all_workers():
    with loader(groups(), num_workers=2) as stream:
        lengths = [next(stream).sequence_length for _ in range(6)]
        assert set(stream.timings()) == {"read", "plan", "decode", "pack"}
        assert stream.timings()["pack"] > 0
        assert stream.counters()["batches"] == 6
        assert stream.counters()["tokens"] == sum(lengths)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"expected_num_tokens": 200}, "expected_num_tokens"),
        ({"max_num_tokens": 0}, "max_num_tokens"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_bad_row_share": 2.0}, "max_bad_row_share"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(DataError, match=message):
        config(**wrong)


def test_packs_per_rank_below_one_is_named():
    with pytest.raises(DataError, match="gradient_accumulation_steps"):
        loader(groups(), packs_per_rank=0)
