"""The ranks of one start agree on its name, whatever earlier starts have left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from echo4o.train.rendezvous import agree_on_start


def start(store: dist.Store, world_size: int) -> set[str]:
    """Rank 0 comes last: the others find an earlier start's name first."""
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [pool.submit(agree_on_start, store, rank, world_size, 20) for rank in reversed(range(world_size))]
        return {rank.result() for rank in ranks}


def test_every_start_has_one_name_of_its_own():
    store = dist.HashStore()
    names = [start(store, 3) for _ in range(3)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 3


def test_it_does_not_wait_for_ever():
    store = dist.HashStore()
    start(store, 2)
    with pytest.raises(RuntimeError):
        agree_on_start(store, 1, 2, timeout=0.3)
    with pytest.raises(RuntimeError):
        agree_on_start(store, 0, 2, timeout=0.3)
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(RuntimeError):
        agree_on_start(dist.PrefixStore("first", store), 1, 2, timeout=0.3)
