"""echo4o data cache configs/my_run.yaml --out cache

Encodes every image of a run's data once and keeps what the frozen encoders make of it, so that training decodes and
encodes no image twice. On several GPUs: ``torchrun --nproc-per-node 8 -m echo4o.cli data cache … --out cache``.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo4o.config import ConfigError, RunConfig, load_config, plan_loading, validate
from echo4o.data.errors import DataError
from echo4o.data.latent_cache import ENCODERS, IDENTITY, Identity, store_folder
from echo4o.data.latent_index import read_index
from echo4o.data.sources.base import SourceGroup
from echo4o.data.sources.rows import GroupRows
from echo4o.model.vae import AutoEncoder
from echo4o.train.caching.encoders import Encoder, VaeEncoder, file_fingerprint, vae_identity
from echo4o.train.caching.filling import Filler
from echo4o.train.caching.progress import Looking, Progress, duration
from echo4o.train.caching.survey import Failures, Survey, cacheable, take_survey
from echo4o.train.caching.vision import vit_encoder
from echo4o.train.caching.work import Unit, as_bytes, close_store, do_units, is_done, list_units, open_store
from echo4o.train.data import build_groups, build_tokenizer
from echo4o.train.engine.single import resolve_device, resolve_dtype
from echo4o.train.fetching import fetch_model
from echo4o.train.initialise import architecture_of, vae_file
from echo4o.train.memory import size_text
from echo4o.train.processes import Processes

DTYPES = ("float32", "bfloat16")
IMAGES_PER_SHARD = 64
#: Of a tensor's name, shape and place in a shard's header.
_HEADER_BYTES = 120
#: Seconds between two looks at what other processes have in hand.
_PAUSE = 0.2


@dataclass
class Cached:
    """What a run of the cache has come to.

    Attributes:
        num_images: distinct images and sizes that the run's data needs.
        num_bytes: of their tensors.
        num_encoded: images that had to be encoded, by whichever process.
        seconds: that encoding took.
        failures: rows and images that cannot be cached; training counts them as bad rows.
    """

    num_images: int
    num_bytes: int
    num_encoded: int
    seconds: float
    failures: Failures


def run(
    config: str | Path | RunConfig,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    dtype: str = "float32",
    vit: bool = False,
    images_per_shard: int = IMAGES_PER_SHARD,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> Cached:
    """Cache what the frozen encoders make of every image of a run. Called by all processes of torchrun alike.

    It may be killed at any time and started again, with any number of processes: the shards come out the same. Several
    runs may fill one folder at once.

    Args:
        config: the training's settings: the data, the model folder, the device, ``dtype`` of products,
            ``num_workers`` threads that decode.
        out: folder of the cache; by default the settings' ``latent_cache``.
        overrides: settings that overrule those of the file.
        dtype: of what is stored, ``float32`` or ``bfloat16``.
        vit: cache also what the vision encoder makes of images; it must be frozen in this run.
        images_per_shard: of a new unit of work.
        dry_run: only say how much it would be.
        say: prints what the first process has to say; by default to standard output.

    Raises:
        ConfigError: for settings that cannot work.
        DataError: if the folder holds another VAE's moments, has no room, or the data cannot be used.
    """
    settings, folder = _checked(config, out, overrides, dtype, images_per_shard)
    processes = Processes.from_environment(settings.training.dist_timeout)
    speak = (say or _print) if processes.rank == 0 else None
    try:
        device = resolve_device(settings.training.device, processes.local_rank)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes.start(device)
    groups, encoders = _prepare(settings, processes, device, dtype, vit)
    result = _Run(settings, folder, groups, encoders, processes, speak).work(images_per_shard, dry_run)
    processes.close()
    return result


def _print(text: str) -> None:
    print(text, flush=True)


def _checked(
    config: str | Path | RunConfig,
    out: str | Path | None,
    overrides: Sequence[str] | Mapping[str, Any],
    dtype: str,
    images_per_shard: int,
) -> tuple[RunConfig, Path]:
    """The settings, and the folder of the cache."""
    settings = config if isinstance(config, RunConfig) else load_config(config, overrides)
    folder = out or settings.data.latent_cache
    if folder is None:
        raise ConfigError("say where the cache shall be: --out FOLDER, or latent_cache in the settings")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard is {images_per_shard}; it must be at least 1")
    # The cache that the settings name is what shall be made: it need not be there.
    settings = replace(settings, data=replace(settings.data, latent_cache=None, latent_cache_strict=False))
    validate(settings)
    return settings, Path(folder).expanduser()


def _prepare(
    settings: RunConfig, processes: Processes, device: torch.device, dtype: str, vit: bool
) -> tuple[list[SourceGroup], list[Encoder]]:
    """The data and the encoders of a run."""
    plan = plan_loading(settings, None, partial(fetch_model, processes=processes))
    architecture = architecture_of(plan, settings)
    if not architecture.visual_gen:
        raise ConfigError("visual_gen is False: such a run uses no VAE, there is nothing to cache")
    groups = build_groups(settings, architecture, *build_tokenizer(plan))
    try:
        path = vae_file(plan.configs_from or settings.model.vae_path)
        vae = AutoEncoder.from_pretrained(path, config=architecture.vae, device=device)
        products = resolve_dtype(settings.training.dtype, device)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    fingerprint = processes.broadcast(file_fingerprint(path) if processes.rank == 0 else "")
    encoders: list[Encoder] = [VaeEncoder(vae, vae_identity(vae, fingerprint, products, dtype))]
    if vit:
        encoders.append(vit_encoder(plan, architecture, settings, device, products, dtype))
    return groups, encoders


@dataclass
class _Run:
    settings: RunConfig
    cache: Path
    groups: Sequence[SourceGroup]
    encoders: Sequence[Encoder]
    processes: Processes
    speak: Callable[[str], None] | None

    def work(self, images_per_shard: int, dry_run: bool) -> Cached:
        sources = cacheable(self.groups)
        survey = self._survey(sources)
        to_write = self._announce(survey)
        total = Cached(0, 0, 0, 0.0, survey.failures)
        stores = []
        for encoder in self.encoders:
            items, identity = survey.items[encoder.identity.kind], encoder.identity
            total.num_images += len(items)
            total.num_bytes += _num_bytes(identity, items["key"])
            if not dry_run:
                stores.append((encoder, items, self._units(sources, items, identity, images_per_shard)))
        if dry_run:
            return total
        require_room(self.cache, to_write)
        for encoder, items, units in stores:
            self._do(encoder, items, units, sources, total)
        if total.failures.counts:
            self._say(f"not cached, training counts them as bad rows:\n{total.failures.describe()}")
        return total

    def _units(
        self, sources: Sequence[GroupRows], items: np.ndarray, identity: Identity, images_per_shard: int
    ) -> list[Unit]:
        """What is to be done in a store, which is made if need be; the first process says it to all."""
        units: list[Unit] = []
        if self.processes.rank == 0:
            folder = store_folder(self.cache, identity.kind)
            rules = [rule for source in sources if (rule := source.resize_rules().get(identity.kind)) is not None]
            open_store(folder, identity, rules)
            units = list_units(folder, identity, items["key"], images_per_shard)
        return self.processes.broadcast(units)

    def _do(
        self, encoder: Encoder, items: np.ndarray, units: list[Unit], sources: Sequence[GroupRows], total: Cached
    ) -> None:
        """Fill a store together with the other processes."""
        folder, started = store_folder(self.cache, encoder.identity.kind), time.monotonic()
        count = sum(len(unit.keys) for unit in units if not is_done(folder, unit))
        failures = self._fill(folder, encoder, units, sources, items)
        for found in self.processes.gather(failures):
            total.failures.merge(found)
        if self.processes.rank == 0:
            close_store(folder, encoder.identity)
        seconds = time.monotonic() - started
        total.num_encoded += count
        total.seconds += seconds
        rate = f", {count / seconds:.1f} images/s" if count else ""
        self._say(f"{folder}: {count:,} images encoded in {duration(seconds)}{rate}")

    def _survey(self, sources: Sequence[GroupRows]) -> Survey:
        data = self.settings.data
        if left_out := [group.name for group in self.groups if not isinstance(group.source, GroupRows)]:
            self._say(f"not cached, their rows are streamed: {', '.join(left_out)}")
        return take_survey(
            sources,
            [encoder.identity.kind for encoder in self.encoders],
            self.processes,
            max_num_tokens=min(data.max_num_tokens_per_sample, data.max_num_tokens),
            num_threads=max(1, data.num_workers),
            on_progress=Looking(self.speak),
        )

    def _announce(self, survey: Survey) -> int:
        """Say what there is and what it will take; returns the bytes to be written."""
        total = 0
        self._say(f"{survey.num_rows:,} rows")
        for encoder in self.encoders:
            identity, keys = encoder.identity, survey.items[encoder.identity.kind]["key"]
            folder = store_folder(self.cache, identity.kind)
            missing = keys
            if (folder / IDENTITY).exists():
                missing = keys[~read_index(folder, identity.num_bytes).has(keys)]
            to_write = _num_bytes(identity, missing)
            total += to_write
            self._say(
                f"{len(keys):,} distinct images and sizes for the {ENCODERS[identity.kind]}: "
                f"{size_text(_num_bytes(identity, keys))} in {identity.stored}; {len(keys) - len(missing):,} are in "
                f"{folder}, {len(missing):,} are to be encoded ({size_text(to_write)})"
            )
        first = self.encoders[0].identity
        if first.products == "bfloat16" and first.stored == "float32":
            self._say("products are bfloat16 in this run: moments in bfloat16 are the same numbers in half the room")
        if survey.num_too_long:
            self._say(f"left out, longer than max_num_tokens_per_sample: {survey.num_too_long:,} rows")
        return total

    def _fill(
        self, folder: Path, encoder: Encoder, units: Sequence[Unit], sources: Sequence[GroupRows], items: np.ndarray
    ) -> Failures:
        processes, progress = self.processes, Progress(folder, units, self.speak)
        threads = max(1, self.settings.data.num_workers)
        first = len(units) * processes.rank // processes.world_size

        def wait() -> None:
            progress.tick()
            time.sleep(_PAUSE)

        with contextlib.closing(Filler(folder, encoder, sources, items, threads, progress)) as filler:
            do_units(folder, units, filler, first, wait)
        return filler.failures

    def _say(self, text: str) -> None:
        if self.speak is not None:
            self.speak(text)


def _num_bytes(identity: Identity, keys: np.ndarray) -> int:
    """On disk, headers included."""
    return sum(identity.num_bytes(key) + _HEADER_BYTES for key in as_bytes(keys))


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises DataError if the disk lacks room."""
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise DataError(
            f"{folder} needs {size_text(num_bytes)} more, {size_text(free)} are free. Choose another --out, or "
            "--stored bfloat16, which takes half the room."
        )
