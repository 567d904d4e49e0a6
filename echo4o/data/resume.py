"""Resuming the data stream: how large steps are then, and what the streams of a rank start from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from echo4o.data.composition import with_restarted_groups
from echo4o.data.dealing import deal_anew
from echo4o.data.errors import DataError
from echo4o.data.same_data import check_same_data
from echo4o.data.sources.base import SourceGroup
from echo4o.data.streams import StreamLayout

logger = logging.getLogger(__name__)

STATE_VERSION = 3


def plan_resume(
    state: Mapping[str, Any], world_size: int, packs_per_rank: int, keep_packs_per_step: bool
) -> tuple[int, str]:
    """Packs that each rank takes a step after a resume.

    Args:
        state: of the data stream, saved by any rank.
        world_size, packs_per_rank: of the run that resumes; packs_per_rank is its gradient_accumulation_steps.
        keep_packs_per_step: adapt packs_per_rank, so that steps stay as large as they were.

    Returns:
        packs_per_rank, and a note for people ("" where nothing changes).
    """
    before = state.get("packs_per_step")
    if before is None:  # of an earlier version, which the loader refuses
        return packs_per_rank, ""
    if not keep_packs_per_step:
        now = world_size * packs_per_rank
        return packs_per_rank, "" if now == before else f"{now} packs a step instead of {before}; data dealt anew"
    kept = max(1, round(before / world_size))
    change = f"gradient_accumulation_steps {packs_per_rank} → {kept} on {_ranks(world_size)}"
    if before % world_size:
        return kept, (
            f"{world_size * kept} packs a step, since the {before} of before cannot be shared equally by "
            f"{_ranks(world_size)} (gradient_accumulation_steps {kept}): steps have another size, data dealt anew"
        )
    if kept != packs_per_rank:
        return kept, f"{before} packs a step as before: {change}"
    if world_size != state["world_size"]:
        return kept, f"{before} packs a step as before, on {state['world_size']} → {_ranks(world_size)}"
    return kept, ""


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


@dataclass(frozen=True)
class ResumedStreams:
    """What the streams of a rank start from.

    Attributes:
        layout: of the streams; theirs of before where steps have as many packs as then.
        num_batches: packs that the rank has taken since these streams began.
        states, counters: of each stream that has delivered before.
    """

    layout: StreamLayout
    num_batches: int
    states: dict[int, dict[str, Any]]
    counters: dict[int, dict[str, int]]


@dataclass
class SavedRanks:
    """The states that the ranks of a run saved, each read once and only when it is needed."""

    read: Callable[[int], dict[str, Any]]
    num_ranks: int
    _states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, rank: int) -> dict[str, Any]:
        """Raises DataError if it cannot be used."""
        if rank not in self._states:
            state = self.read(rank)
            if state.get("version") != STATE_VERSION:
                raise DataError(
                    f"data state of version {state.get('version')}; this program reads version {STATE_VERSION}. Begin "
                    "the data stream anew with --resume_data False"
                )
            if (state["rank"], state["world_size"]) != (rank, self.num_ranks):
                raise DataError(
                    f"the data state of rank {rank} of {self.num_ranks} says that it is that of rank {state['rank']} "
                    f"of {state['world_size']}: the checkpoint's files are mixed up. Resume from another checkpoint, "
                    "or begin the data stream anew with --resume_data False"
                )
            self._states[rank] = state
        return self._states[rank]


def resume_streams(
    saved: SavedRanks, layout: StreamLayout, groups: Sequence[SourceGroup], data_seed: int
) -> ResumedStreams:
    """Where the streams of a rank go on.

    With as many packs a step as before they continue exactly, on any number of ranks, whatever the number of workers;
    with others, what is left of the data is dealt anew.

    Raises:
        DataError: if the states are of another version or of other data, or were saved in the middle of a step and
            ranks share the packs differently now.
    """
    # Had as many packs a step been saved, this rank's first slot would be there.
    world_size = layout.packs_per_step // layout.packs_per_rank
    first = saved[layout.rank * saved.num_ranks // world_size]
    check_same_data(first["data"], groups, data_seed)
    restarted = {group.name: len(group.source) for group in groups if not group.resume_data_status}
    if first["packs_per_step"] == layout.packs_per_step:
        return _continued(saved, first, layout, restarted)
    return _dealt(saved, first, layout, groups, restarted)


def _continued(
    saved: SavedRanks, first: Mapping[str, Any], layout: StreamLayout, restarted: dict[str, int]
) -> ResumedStreams:
    layout = replace(layout, streams_per_pack=first["streams_per_pack"], first_step=first.get("first_step", 0))
    packs_per_rank = layout.packs_per_step // saved.num_ranks
    streams = layout.own_streams
    owners = {stream: stream % layout.packs_per_step // packs_per_rank for stream in streams}
    num_batches = first["num_batches"]
    if packs_per_rank != layout.packs_per_rank:
        num_batches = _steps_taken([saved[rank] for rank in sorted(set(owners.values()))], packs_per_rank)
        num_batches *= layout.packs_per_rank
        if layout.rank == 0:
            logger.warning(
                "data: %d streams of %d packs a step go on, saved by %d ranks, now on %d",
                layout.num_streams,
                layout.packs_per_step,
                saved.num_ranks,
                layout.packs_per_step // layout.packs_per_rank,
            )
    states, counters = {}, {}
    for stream in streams:
        rank = saved[owners[stream]]
        if str(stream) in rank["streams"]:
            states[stream] = with_restarted_groups(copy.deepcopy(rank["streams"][str(stream)]), restarted)
            counters[stream] = dict(rank["counters"][str(stream)])
    return ResumedStreams(layout, num_batches, states, counters)


def _steps_taken(states: Sequence[Mapping[str, Any]], packs_per_rank: int) -> int:
    taken = {state["rank"]: state["num_batches"] for state in states}
    steps = {divmod(number, packs_per_rank) for number in taken.values()}
    if len(steps) == 1 and (step := steps.pop())[1] == 0:
        return step[0]
    raise DataError(
        f"the data state was saved in the middle of a step (packs taken by rank: {taken}, {packs_per_rank} a step); "
        "resume with as many ranks and gradient_accumulation_steps as before, from another checkpoint, or begin the "
        "data stream anew with --resume_data False"
    )


def _dealt(
    saved: SavedRanks,
    first: Mapping[str, Any],
    layout: StreamLayout,
    groups: Sequence[SourceGroup],
    restarted: dict[str, int],
) -> ResumedStreams:
    ranks = [saved[rank] for rank in range(saved.num_ranks)]
    deal = deal_anew(
        {int(stream): state for rank in ranks for stream, state in rank["streams"].items()},
        {int(stream): counts for rank in ranks for stream, counts in rank["counters"].items()},
        first["num_streams"],
        layout.num_streams,
        {group.name: len(group.source) for group in groups},
        set(restarted),
    )
    if layout.rank == 0:
        logger.warning(
            "data: %d packs a step instead of %d, so what is left is dealt anew, from %d streams to %d: %s",
            layout.packs_per_step,
            first["packs_per_step"],
            first["num_streams"],
            layout.num_streams,
            "; ".join(f"{name} {rest.describe()}" for name, rest in deal.outstanding.items()),
        )
    steps_taken = first["num_batches"] * first["world_size"] // first["packs_per_step"]
    layout = replace(layout, first_step=first.get("first_step", 0) + steps_taken)
    own = layout.own_streams
    return ResumedStreams(
        layout,
        0,
        {stream: deal.state(stream) for stream in own},
        {stream: deal.counters(stream) for stream in own},
    )
