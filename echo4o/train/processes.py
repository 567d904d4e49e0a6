"""The processes of a run: who am I, how many are we, and small exchanges between us over gloo.

Started by torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT); without these
variables a run is one process, and no process group exists unless an engine asks for one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from echo4o.train.rendezvous import agree_on_start

T = TypeVar("T")

#: Seconds that a question to the rendezvous' store may take.
STORE_TIMEOUT = 5.0


class RendezvousError(RuntimeError):
    """The processes of the run do not find each other; the message names the remedy."""


@dataclass
class Processes:
    """This process among all.

    Attributes:
        rank / world_size: among all processes of the run.
        local_rank / local_world_size: among those of this machine.
        host: name of this machine.
        timeout: seconds after which an exchange that does not end fails.
        group: for small exchanges on CPU tensors, apart from the engines' own; None in a run of one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    timeout: float = 1800.0
    host: str = field(default_factory=socket.gethostname)
    group: Any = None
    _started: bool = False

    @classmethod
    def from_environment(cls, timeout: float = 1800.0, environment: Mapping[str, str] = os.environ) -> Processes:
        """Read torchrun's variables.

        Raises:
            ValueError: if they contradict each other.
        """
        world_size, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world_size}: start the run with torchrun")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", str(world_size))),
            timeout=timeout,
        )

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} on host {self.host}"

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // max(1, self.local_world_size))

    def start(self, device: torch.device, *, even_alone: bool = False) -> None:
        """Join the process group: NCCL for a GPU's tensors (bound to `device`), gloo for those on the CPU.

        Args:
            even_alone: also in a run of one process (an engine that shards over one).

        Raises:
            RendezvousError: if the others do not appear within the timeout.
        """
        if self._started or (self.world_size == 1 and not even_alone):
            return
        on_gpu = device.type == "cuda"
        timeout = timedelta(seconds=self.timeout)
        options: dict[str, Any] = {"device_id": device} if on_gpu else {}
        if self.world_size == 1 and "MASTER_ADDR" not in os.environ:
            # Alone, nobody has to be met: a file serves, and no port is taken.
            self._rendezvous = Path(tempfile.mkdtemp(prefix="echo4o-"))
            options |= {"store": dist.FileStore(str(self._rendezvous / "store"), 1), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                options |= {"store": self._store_of_this_start(), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, **options)
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            raise RendezvousError(
                f"{self.name} does not meet the other ranks at {rendezvous_address()}: {str(error).splitlines()[0]}\n"
                "  Look for an error of another rank. Otherwise check that this address is the first node's and can be "
                "reached from all, and name the network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
                f"(--dist_timeout, now {self.timeout:.0f} s, waits longer)."
            ) from error
        self._started = True

    def close(self) -> None:
        """Leave the process group; call it when all ranks are through, not after a failure."""
        if self._started:
            dist.destroy_process_group()
            self.group, self._started = None, False

    def connect_store(self, key: str) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
        """A connection of its own to the store of the rendezvous, for one thread; names in it begin with `key`."""
        store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        store.set_timeout(timedelta(seconds=STORE_TIMEOUT))
        return dist.PrefixStore(key, store)  # pyright: ignore[reportPrivateImportUsage]

    def _store_of_this_start(self) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, self.world_size, False, timedelta(seconds=self.timeout))  # pyright: ignore[reportPrivateImportUsage]
        return dist.PrefixStore(agree_on_start(store, self.rank, self.world_size, self.timeout), store)  # pyright: ignore[reportPrivateImportUsage]

    # ------------------------------------------------------------ exchanges

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank (small picklable objects)."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank (small picklable objects)."""
        if self.world_size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.monitored_barrier(self.group, timedelta(seconds=self.timeout), wait_all_ranks=True)

    def apart(self) -> Processes:
        """The same processes with a gloo group of its own, for exchanges in another thread."""
        if self.world_size == 1:
            return self
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)))


def rendezvous_address() -> str:
    """For messages."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
