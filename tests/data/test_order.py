"""Epoch order: every row once, neighbours near, different every epoch, the same everywhere."""

from hypothesis import given
from hypothesis import strategies as st

from echo4o.data.sources.base import item_seed
from echo4o.data.sources.order import EpochOrder

UNITS = st.lists(st.integers(0, 20), min_size=1, max_size=20).filter(any)


@given(UNITS, st.integers(0, 5), st.integers(0, 2**31))
def test_every_row_exactly_once_an_epoch(unit_lengths, epoch, seed):
    order = EpochOrder(unit_lengths, seed, "source")
    rows = [order.row_at(epoch, position) for position in range(len(order))]
    assert sorted(rows) == list(range(sum(unit_lengths)))


@given(UNITS, st.data())
def test_a_span_touches_few_units(unit_lengths, data):
    order = EpochOrder(unit_lengths, 7, "source")
    unit_of = [unit for unit, length in enumerate(unit_lengths) for _ in range(length)]
    start = data.draw(st.integers(0, len(order) - 1))
    length = data.draw(st.integers(1, len(order) - start))
    units = [unit_of[order.row_at(0, position)] for position in range(start, start + length)]
    changes = 1 + sum(before != after for before, after in zip(units, units[1:], strict=False))
    assert changes == len(set(units)), "a unit is left and entered again"


def test_the_order_depends_on_epoch_seed_and_name_and_on_nothing_else():
    def order_of(epoch=0, seed=1, name="a", asked=range(60)):
        order = EpochOrder([20, 20, 20], seed, name)
        return {position: order.row_at(epoch, position) for position in asked}

    assert order_of() == order_of(asked=list(reversed(range(60))))
    assert len({tuple(order_of(**change).values()) for change in [{}, {"epoch": 1}, {"seed": 2}, {"name": "b"}]}) == 4
    interleaved = EpochOrder([20, 20, 20], 1, "a")
    rows = [(interleaved.row_at(0, p), interleaved.row_at(1, p), interleaved.row_at(2, p)) for p in range(60)]
    assert [row[0] for row in rows] == list(order_of().values())
    assert [row[1] for row in rows] == list(order_of(epoch=1).values())


def test_item_seeds_are_stable_and_distinct():
    assert item_seed(42, 0, "multi_ref", 7) == 4037824026575643548
    seeds = {item_seed(s, e, n, r) for s in range(3) for e in range(3) for n in ("a", "b") for r in range(50)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)
