"""Losses on fixed rows that are not trained on: nothing is dropped, noise and time steps are always the same.

Only weights differ from one measurement to the next, so that even small differences mean something. Every pack is of
one data set; it is decoded and encoded once and passes the model once for each of `TIMES`.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from echo4o.config import ConfigError, RunConfig
from echo4o.data.errors import RowError
from echo4o.data.packing import Packer, SegmentLike
from echo4o.data.sample import ConditionDropout, Sample, Segment
from echo4o.data.sequence import Decisions
from echo4o.data.sources import SourceGroup, build_sources, read_dataset_config
from echo4o.data.sources.base import Address
from echo4o.data.sources.drafts import SegmentDraft
from echo4o.data.sources.rows import GroupRows
from echo4o.data.tokenizer import SpecialTokens, Tokenizer
from echo4o.model import BagelConfig
from echo4o.model.vae import AutoEncoder
from echo4o.packed import PackedBatch
from echo4o.train.baselines import copy_errors
from echo4o.train.data import packing_config, source_context
from echo4o.train.engine import Engine
from echo4o.train.latents import encode_batch
from echo4o.train.processes import Processes

logger = logging.getLogger(__name__)

#: Times (after the shift: shares of noise) at which every row is measured.
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
#: Here the picture comes from prompt and references, hardly from what is given of it.
NOISIEST = f"t_{TIMES[-1]}"
#: Of the choice of rows, and of everything about a row that is drawn. Another data_seed changes nothing.
SEED = 0
#: Rows of a data set that are looked at for each one that is wanted: some cannot be used.
_TRIES = 4

_CLEAN = -math.inf


class WholePacker(Packer):
    """Drops nothing; noise is that of the sample's own seed, as in training."""

    def decide(self, segments: Sequence[SegmentLike], seed: int, dropout: ConditionDropout | None = None) -> Decisions:
        return replace(super().decide(segments, seed, dropout), dropped=(False,) * len(segments))


@dataclass(frozen=True)
class PlannedPack:
    """Rows of one data set that are measured together.

    Attributes:
        draws: images are generated in it, so that it is measured at all `TIMES`; else once.
    """

    data_set: str
    addresses: tuple[Address, ...]
    draws: bool


class Validation:
    """The rows of a run's validation data, and how they are measured.

    Args:
        groups: of the validation YAML.
        packer: see `WholePacker`.
        packs: the same on every rank.
        config: of the model.
        timestep_shift: of the run.
    """

    def __init__(
        self,
        groups: Sequence[SourceGroup],
        packer: Packer,
        packs: Sequence[PlannedPack],
        config: BagelConfig,
        timestep_shift: float,
    ) -> None:
        self.packer, self.config = packer, config
        # Those that draw come first: a round of packs, one a rank, is as long as its longest.
        self.packs = sorted(packs, key=lambda pack: not pack.draws)
        self.data_sets = list(dict.fromkeys(pack.data_set for pack in packs))
        self._rows = {group.name: cast(GroupRows, group.source) for group in groups}
        self._logits = [inverse_shift(t, timestep_shift) for t in TIMES]

    @property
    def num_rows(self) -> int:
        return sum(len(pack.addresses) for pack in self.packs)

    @torch.no_grad()
    def measure(
        self, engine: Engine, vae: AutoEncoder | None, go_on: Callable[[], bool] = lambda: True
    ) -> dict[str, float] | None:
        """Losses and baselines (see `losses_of`) of the engine's weights; the same on every rank.

        Every rank passes the model equally often, as sharded engines need it; who has no pack left takes a filler.
        Rows that cannot be read are left out, with a warning.

        Args:
            go_on: asked on every rank before each round of packs; False ends the measurement without a result.
        """
        world_size = engine.world_size
        sums = Sums(self.data_sets, self.config.latent_dim if vae is not None else 0)
        for start in range(0, len(self.packs), world_size):
            if not go_on():
                return None
            round_ = self.packs[start : start + world_size]
            num_passes = len(TIMES) if any(pack.draws for pack in round_) else 1
            own = round_[engine.rank] if engine.rank < len(round_) else None
            batch = self._load(own) if own is not None else None
            row = sums.row(own.data_set) if own is not None and batch is not None else None
            self._measure(engine, vae, batch or self._filler(), num_passes, row)
        sums.values = engine.all_reduce_sum(sums.values)
        return losses_of(sums)

    def _load(self, pack: PlannedPack) -> PackedBatch | None:
        samples = []
        for address in pack.addresses:
            try:
                samples.append(self._rows[address.source].locate(address).load())
            except RowError as error:
                logger.warning("a validation row is left out: %s", error)
        return self.packer.pack(samples) if samples else None

    def _filler(self) -> PackedBatch:
        """The shortest pack that the model accepts."""
        config = self.packer.config
        segment = Segment("text", text_ids=(config.eos_token_id,), loss=True)
        return self.packer.pack([Sample((segment,), seed=0)])

    def _measure(
        self, engine: Engine, vae: AutoEncoder | None, batch: PackedBatch, num_passes: int, row: Row | None
    ) -> None:
        batch = batch.to(engine.device)
        with engine.autocast():
            latents, noise = (None, None) if vae is None else encode_batch(vae, batch, self.config.latent_patch_size)
        noised = None if batch.packed_timesteps is None else batch.packed_timesteps > _CLEAN
        if row is not None and latents is not None and noised is not None and bool(noised.any()):
            row.add_targets(latents[noised])
            row.add_copies(copy_errors(batch, latents, noised, self.config.latent_patch_size))
        for number, logit in enumerate(self._logits[:num_passes]):
            if noised is not None:
                batch.packed_timesteps = torch.where(noised, logit, _CLEAN).float()
            with engine.autocast():
                output = engine.module(batch, latents, noise, return_hidden=False)
            if row is not None:
                row.add_losses(number, output.mse, output.ce if number == 0 else None)


class Sums:
    """What the means are made of: a row of float64 numbers for each data set, to be added up over ranks."""

    def __init__(self, data_sets: Sequence[str], latent_dim: int) -> None:
        self.data_sets, self.latent_dim = list(data_sets), latent_dim
        self.values = torch.zeros(len(data_sets), len(TIMES) + 6 + latent_dim, dtype=torch.float64)

    def row(self, data_set: str) -> Row:
        return Row(self.values[self.data_sets.index(data_set)])


class Row:
    """Of `Sums`, by name. Errors are means over a latent token's channels."""

    def __init__(self, values: Tensor) -> None:
        times = len(TIMES)
        self.mse = values[:times]  # summed over target tokens, by time
        self.targets = values[times : times + 2]  # tokens; mean square, summed
        self.copies = values[times + 2 : times + 4]  # tokens of targets with references; best reference's error
        self.ce = values[times + 4 : times + 6]  # tokens; cross-entropy
        self.total = values[times + 6 :]  # of the targets' tokens

    def add_losses(self, number: int, mse: Tensor | None, ce: Tensor | None) -> None:
        if mse is not None:
            self.mse[number] += mse.double().mean(dim=-1).sum().cpu()
        if ce is not None:
            self.ce += torch.tensor([ce.numel(), float(ce.double().sum())], dtype=torch.float64)

    def add_targets(self, latents: Tensor) -> None:
        """`latents` (n, p·p·C) of the targets."""
        latents = latents.double().cpu()
        self.targets += torch.tensor([len(latents), float(latents.square().mean(dim=-1).sum())], dtype=torch.float64)
        self.total += latents.sum(dim=0)

    def add_copies(self, errors: Sequence[tuple[int, float]]) -> None:
        """(number of tokens, summed error) of each target with references."""
        for num_tokens, error in errors:
            self.copies += torch.tensor([num_tokens, error], dtype=torch.float64)


def losses_of(sums: Sums) -> dict[str, float]:
    """Means by metric name: ``val/mse`` and ``val/ce``, and of each data set ``val/mse/NAME`` and ``val/ce/NAME``.

    Beside the first stand the errors that two simple predictors would make of the same tokens at the same times, in the
    same units: ``val/copy_reference`` takes the best reference for the target, ``val/predict_mean`` the mean latent
    over all places of all targets of the data set. A predictor of x₀ is off by (x₀ − prediction) / t in the velocity.
    All are means over the times. ``val/mse/t_0.9`` and the like (the baselines' too) are of one time over all data
    sets, ``val/mse/NAME/t_0.9`` of the noisiest for each: there the baselines are hardest to beat, while at t = 0.1
    they are 100 × their errors in latents, more than a model that has learned nothing makes.
    """
    parts: dict[str, tuple[Tensor, float]] = {}  # sums by time, and tokens
    losses: dict[str, float] = {}
    inverse = torch.tensor([1 / t**2 for t in TIMES], dtype=torch.float64)
    total_ce = torch.zeros(2, dtype=torch.float64)

    def add(name: str, data_set: str, by_time: Tensor, num_tokens: float) -> None:
        if not num_tokens:
            return
        losses[f"{name}/{data_set}"] = float(by_time.mean() / num_tokens)
        losses[f"{name}/{data_set}/{NOISIEST}"] = float(by_time[-1] / num_tokens)
        so_far, count = parts.get(name, (torch.zeros_like(by_time), 0.0))
        parts[name] = (so_far + by_time, count + num_tokens)

    for data_set in sums.data_sets:
        row = sums.row(data_set)
        num_targets, square = row.targets.tolist()
        add("val/mse", data_set, row.mse, num_targets)
        add("val/copy_reference", data_set, row.copies[1] * inverse, float(row.copies[0]))
        if num_targets:
            spread = square - float((row.total / num_targets).square().mean()) * num_targets
            add("val/predict_mean", data_set, spread * inverse, num_targets)
        if row.ce[0]:
            losses[f"val/ce/{data_set}"] = float(row.ce[1] / row.ce[0])
            total_ce += row.ce
    for name, (by_time, count) in parts.items():
        losses[name] = float(by_time.mean() / count)
        losses |= {f"{name}/t_{t}": float(value) / count for t, value in zip(TIMES, by_time, strict=True)}
    if total_ce[0]:
        losses["val/ce"] = float(total_ce[1] / total_ce[0])
    return losses


def inverse_shift(time: float, shift: float) -> float:
    """The logit that `echo4o.model.embeddings.shift_time` takes to `time`."""
    unshifted = time / (shift - (shift - 1) * time)
    return math.log(unshifted / (1 - unshifted))


# ---------------------------------------------------------------- planning


def build_validation(
    config: RunConfig,
    architecture: BagelConfig,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens,
    processes: Processes,
) -> Validation | None:
    """The validation data of a run, opened and planned; None without any. Called by all ranks alike.

    Raises:
        ConfigError: if none of its rows can be used, or the run's own YAML has no validation split.
        DataError: if the YAML or the data it names cannot be used.
    """
    training = config.training
    if not training.eval_every or not training.validation_config_file:
        return None
    path = Path(training.validation_config_file).expanduser()
    context = source_context(config, architecture, tokenizer, special_tokens, path, SEED)
    settings = read_dataset_config(path)
    if "dataset_info" in settings:
        context = replace(context, dataset_info=None)
    if path.resolve() == Path(config.data.dataset_config_file).resolve():
        settings = _validation_sides(settings, path)
    groups = build_sources(settings, context)
    limit = min(config.data.max_num_tokens_per_sample, config.data.max_num_tokens)
    packs = None
    if not processes.rank:  # one rank decides, so that all have the same packs whatever their disks say
        packs = list(plan_packs(groups, training.validation_rows, training.expected_num_tokens, limit))
    packs = processes.broadcast(packs)
    if not packs:
        raise ConfigError(
            f"validation_config_file is {path}, of which no row can be used (the log says why): correct the data, or "
            "raise max_num_tokens_per_sample."
        )
    packer = WholePacker(packing_config(config, architecture, special_tokens))
    return Validation(groups, packer, packs, architecture, training.timestep_shift)


def _validation_sides(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Of the run's own YAML: its groups with a split, turned to the rows that are not trained on."""
    kept: dict[str, Any] = {}
    for name, group in settings.items():
        if not isinstance(group, Mapping) or name == "dataset_info":
            kept[name] = group
        elif group.get("split") is not None:
            kept[name] = {**group, "use_split": "validation"}
    if not any(isinstance(group, Mapping) and "split" in group for group in kept.values()):
        raise ConfigError(
            f"validation_config_file is {path}, the run's own data, but none of its groups has a split: add to a group "
            "split: {validation: 0.02}, or name a YAML of other data."
        )
    return kept


def plan_packs(
    groups: Sequence[SourceGroup], num_rows: int, pack_tokens: int, sample_tokens: int
) -> Iterator[PlannedPack]:
    """The first usable rows of each data set in the order of `SEED`, in packs of up to `pack_tokens` tokens.

    Args:
        num_rows: of each data set; fewer where it has fewer.
        sample_tokens: rows that are longer are left out.
    """
    for group in groups:
        rows = cast(GroupRows, group.source)
        for name, indexes in rows.rows_of_data_sets():
            addresses: list[Address] = []
            length, draws, found = 0, False, 0
            candidates = itertools.islice(_shuffled(indexes), _TRIES * num_rows)
            for index in candidates:
                try:
                    plan = rows.locate(Address(group.name, 0, index))
                except RowError as error:
                    logger.warning("a validation row cannot be used: %s", error)
                    continue
                if plan.num_tokens > sample_tokens:
                    continue
                if addresses and length + plan.num_tokens > pack_tokens:
                    yield PlannedPack(name, tuple(addresses), draws)
                    addresses, length, draws = [], 0, False
                segments = cast(Sequence[SegmentDraft], plan.segments)
                draws = draws or any(segment.loss and segment.kind == "vae_image" for segment in segments)
                addresses.append(plan.address)
                length += plan.num_tokens
                found += 1
                if found == num_rows:
                    break
            if addresses:
                yield PlannedPack(name, tuple(addresses), draws)
            if found < min(num_rows, len(indexes)):
                logger.warning("%s: %d rows can be used for validation, %d were asked for", name, found, num_rows)


def _shuffled(indexes: range) -> Iterator[int]:
    """Indexes in a random order that is always the same, without making a list of millions."""
    generator, seen = random.Random(SEED), set()
    while len(seen) < len(indexes):
        index = indexes[generator.randrange(len(indexes))]
        if index not in seen:
            seen.add(index)
            yield index
