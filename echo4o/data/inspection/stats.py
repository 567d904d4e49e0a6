"""``echo4o data stats CONFIG``: what a mixture really yields, from the packer itself, without decoding a picture."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from echo4o.data.errors import DataError
from echo4o.data.inspection.opening import Opened
from echo4o.data.packing import Packer
from echo4o.data.sample import Sample
from echo4o.data.sources.base import Address, RowPlan, Source, SourceGroup
from echo4o.data.streams import RankStreams, StreamLayout, streams_per_pack

DEFAULT_STEPS = 200


@dataclass(frozen=True)
class _Counted:
    """A sample of which only the plan is known."""

    plan: RowPlan

    @property
    def segments(self) -> Sequence[Any]:
        return self.plan.segments


class _Planned:
    """A source whose rows are never decoded."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name = source.name

    def __len__(self) -> int:
        return len(self._source)

    def plan(self, epoch: int, position: int) -> RowPlan:
        return _without_pictures(self._source.plan(epoch, position))

    def locate(self, address: Address) -> RowPlan:
        return _without_pictures(self._source.locate(address))

    def expect_streams(self, num_streams: int) -> None:
        self._source.expect_streams(num_streams)


def _without_pictures(plan: RowPlan) -> RowPlan:
    sample = Sample((), seed=plan.seed, name=plan.name, row=plan.row, extra={"plan": plan})
    return dataclasses.replace(plan, load=lambda: sample)


@dataclass(frozen=True)
class CountedPack:
    """What a pack would hold."""

    sequence_length: int
    plans: tuple[RowPlan, ...]
    kept: tuple[tuple[bool, ...], ...]


class _CountingPacker(Packer):
    """Counts instead of laying down; drops what the packer would drop."""

    def laid_down_tokens(self, sample: Sample) -> int:
        plan = sample.extra["plan"]
        assert isinstance(plan, RowPlan)
        return sum(s.num_tokens for s, keep in zip(plan.segments, self._kept(plan), strict=True) if keep)

    def pack(self, samples: Sequence[Sample], generator: object = None) -> Any:
        plans = tuple(sample.extra["plan"] for sample in samples)
        length = sum(self.laid_down_tokens(sample) for sample in samples)
        return CountedPack(length, plans, tuple(self._kept(plan) for plan in plans))  # type: ignore[arg-type]

    def _kept(self, plan: RowPlan) -> tuple[bool, ...]:
        return tuple(not drop for drop in self.decide(plan.segments, plan.seed, plan.dropout).dropped)


@dataclass
class GroupStats:
    """What a group gave.

    Attributes:
        rows: of the group.
        samples, tokens: that were packed.
        references: reference images, summed.
        epochs: of the group's rows that the steps take.
    """

    rows: int
    samples: int = 0
    tokens: int = 0
    references: int = 0
    epochs: float = 0.0


@dataclass
class Stats:
    """What `steps` optimiser steps take.

    Attributes:
        fill: mean share of max_num_tokens that a pack uses.
        tokens_by_kind: text, vae_image, vit_image (markers included).
        loss_tokens: of targets and answers.
        skipped: rows that were read and not used, by reason.
    """

    steps: int
    packs: int
    seconds: float
    samples: int
    tokens: int
    fill: float
    tokens_by_kind: dict[str, int]
    loss_tokens: int
    pack_lengths: tuple[int, int, int]
    groups: dict[str, GroupStats] = field(default_factory=dict)
    data_sets: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def mixture_stats(opened: Opened, *, steps: int = DEFAULT_STEPS, ranks: int = 1) -> Stats:
    """Run the packer over the packs of the first `steps` optimiser steps of a run on `ranks` processes.

    Raises:
        DataError: what training would end with.
    """
    if steps < 1 or ranks < 1:
        raise DataError(f"--steps {steps} and --ranks {ranks} must be at least 1")
    run = opened.run
    packs_per_rank = run.training.gradient_accumulation_steps if run else 1
    num_workers = run.data.num_workers if run else 0
    packs_per_step = ranks * packs_per_rank
    groups = [dataclasses.replace(group, source=_Planned(group.source)) for group in opened.groups]
    packer = _CountingPacker(opened.packer.config)
    started, packs, counters = time.perf_counter(), [], Counter()
    for rank in range(ranks):
        layout = StreamLayout(packs_per_step, streams_per_pack(num_workers), packs_per_rank, rank)
        last = _take(opened, groups, packer, layout, steps * packs_per_rank, packs)
        for counts in last:
            counters.update(counts)
    return _summed(opened, packs, counters, steps, time.perf_counter() - started)


def _take(
    opened: Opened,
    groups: Sequence[SourceGroup],
    packer: Packer,
    layout: StreamLayout,
    count: int,
    packs: list[CountedPack],
) -> Iterator[dict[str, int]]:
    run = opened.run
    streams = RankStreams(
        groups,
        packer,
        opened.limits,
        run.data.data_seed if run else 42,
        run.data.max_bad_row_share if run else 1.0,
        layout,
        {},
        0,
    )
    last: dict[int, dict[str, int]] = {}
    console = Console(stderr=True)
    deliveries = zip(range(count), streams, strict=False)
    for position, delivery in track(
        deliveries, "packing", count, console=console, transient=True, disable=not console.is_terminal
    ):
        if delivery.error:
            raise DataError(delivery.error)
        packs.append(delivery.batch)  # type: ignore[arg-type]
        last[layout.stream_at(position)] = delivery.counters
    yield from last.values()


def _summed(opened: Opened, packs: list[CountedPack], counters: Counter, steps: int, seconds: float) -> Stats:
    group_of = {group.source.name: group.name for group in opened.groups}
    groups = {group.name: GroupStats(len(group.source)) for group in opened.groups}
    kinds: Counter[str] = Counter()
    data_sets: dict[str, int] = defaultdict(int)
    loss_tokens = 0
    for pack in packs:
        for plan, kept in zip(pack.plans, pack.kept, strict=True):
            found = groups[group_of[plan.address.source]]
            segments = [s for s, keep in zip(plan.segments, kept, strict=True) if keep]
            found.samples += 1
            found.tokens += sum(segment.num_tokens for segment in segments)
            found.references += references_of(plan)
            data_sets[plan.name] += 1
            for segment in segments:
                kinds[segment.kind] += segment.num_tokens
                loss_tokens += segment.num_tokens * bool(getattr(segment, "loss", False))
    for found in groups.values():
        found.epochs = found.samples / found.rows if found.rows else 0.0
    lengths = sorted(pack.sequence_length for pack in packs)
    skipped = {
        name: count
        for name, count in counters.items()
        if count and name not in ("batches", "samples", "tokens", "buffered", "rows", "good")
    }
    return Stats(
        steps=steps,
        packs=len(packs),
        seconds=seconds,
        samples=sum(found.samples for found in groups.values()),
        tokens=sum(lengths),
        fill=sum(lengths) / (len(lengths) * opened.limits.max_num_tokens),
        tokens_by_kind=dict(kinds),
        loss_tokens=loss_tokens,
        pack_lengths=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        groups=groups,
        data_sets=dict(data_sets),
        skipped=skipped,
    )


def references_of(plan: RowPlan) -> int:
    """Reference images of a planned row: conditions laid down as VAE or as ViT image."""
    kinds = Counter(s.kind for s in plan.segments if s.kind != "text" and not getattr(s, "loss", False))
    return max(kinds.get("vae_image", 0), kinds.get("vit_image", 0))


# ---------------------------------------------------------------- output


def stats_json(stats: Stats) -> str:
    return json.dumps(dataclasses.asdict(stats), indent=2)


def stats_text(stats: Stats, opened: Opened) -> str:
    """Tables for people."""
    shortest, middle, longest = stats.pack_lengths
    lines = [
        f"{opened.title}: {stats.steps:,} steps, {stats.packs:,} packs, {stats.samples:,} samples, "
        f"{stats.tokens:,} tokens (in {stats.seconds:.1f} s)",
        f"  tokens a step   {stats.tokens / stats.steps:,.0f}   samples a step {stats.samples / stats.steps:.1f}",
        f"  fill            {stats.fill:.1%} of max_num_tokens {opened.limits.max_num_tokens:,}; packs of "
        f"{shortest:,} to {longest:,}, median {middle:,}",
        "  of the tokens   "
        + ", ".join(f"{count / stats.tokens:.1%} {kind}" for kind, count in sorted(stats.tokens_by_kind.items()))
        + f"; {stats.loss_tokens / stats.tokens:.1%} are learned",
        "",
        f"  {'group':<18}{'rows':>10}{'samples':>9}{'share':>8}{'of tokens':>11}{'tokens each':>13}{'references':>12}"
        f"{'epochs':>9}{'steps an epoch':>16}",
    ]
    for name, found in stats.groups.items():
        each = found.tokens / found.samples if found.samples else 0
        epoch = f"{stats.steps / found.epochs:,.0f}" if found.epochs else "–"
        lines.append(
            f"  {name:<18}{found.rows:>10,}{found.samples:>9,}{found.samples / max(1, stats.samples):>8.1%}"
            f"{found.tokens / max(1, stats.tokens):>11.1%}{each:>13,.0f}"
            f"{found.references / max(1, found.samples):>12.2f}{found.epochs:>9.2f}{epoch:>16}"
        )
    if stats.skipped:
        counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(stats.skipped.items()))
        lines += ["", f"  not used: {counted}"]
    if opened.counts_words:
        lines += ["", "  Without a model's tokenizer words were counted for tokens of text: pass --tokenizer FOLDER."]
    return "\n".join(lines)
