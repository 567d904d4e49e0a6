"""Which start of the run is this? The ranks agree on a name for it before they make a process group.

torchrun's restarts share one store, and torch reads from it what an earlier start has left: addresses of dead
processes. torchrun's count of restarts is no remedy, as its nodes may disagree about it (pytorch issue 135712).
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

CURRENT = "echo4o/start"
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 1.0


def agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:  # pyright: ignore[reportPrivateImportUsage]
    """A name that is the same on all ranks of this start, and on none of another.

    Rank 0 makes up a name, and confirms it with what every rank has made up for itself: so nobody takes an earlier
    start's confirmation for this one's.

    Raises:
        RuntimeError: if not all ranks come within `timeout` seconds.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(CURRENT, mine)
        others = [f"{mine}/{other}" for other in range(1, world_size)]
        store.wait(others, timedelta(seconds=timeout))
        store.set(f"{mine}/all", json.dumps([mine, *(store.get(name).decode() for name in others)]))
        return mine
    end, wait = time.monotonic() + timeout, SHORTEST_WAIT
    while time.monotonic() < end:
        # Read anew each time: rank 0 may be late, and this name an earlier start's.
        start = store.get(CURRENT).decode()
        store.set(f"{start}/{rank}", mine)
        time.sleep(wait)
        if store.check([f"{start}/all"]) and json.loads(store.get(f"{start}/all"))[rank] == mine:
            return start
        wait = min(2 * wait, LONGEST_WAIT)
    raise RuntimeError(f"rank 0 did not confirm rank {rank} within {timeout:.0f} s")
