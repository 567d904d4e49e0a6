"""echo4o data cache configs/my_run.yaml --out cache

Encodes every image of a run's data once and keeps what the frozen encoders make of it, so that training decodes and
encodes no image twice. On several GPUs: ``torchrun --nproc-per-node 8 -m echo4o.cli data cache … --out cache``.
"""

from __future__ import annotations

import contextlib
import logging
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
from echo4o.data.latent_cache import ENCODERS, Identity, LatentCache, LatentStore, store_folder
from echo4o.data.sources.base import SourceGroup
from echo4o.data.sources.rows import GroupRows
from echo4o.model.vae import AutoEncoder
from echo4o.train.caching.encoders import Encoder, VaeEncoder, file_fingerprint, vae_identity
from echo4o.train.caching.filling import Filler
from echo4o.train.caching.progress import Looking, Progress, duration
from echo4o.train.caching.survey import Failures, Survey, cacheable, take_survey
from echo4o.train.caching.work import Unit, as_bytes, close_store, do_units, is_done, list_units, open_store
from echo4o.train.data import build_groups, build_tokenizer
from echo4o.train.engine.single import resolve_device, resolve_dtype
from echo4o.train.fetching import fetch_model
from echo4o.train.initialise import architecture_of, vae_file
from echo4o.train.memory import size_text
from echo4o.train.processes import Processes

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
IMAGES_PER_SHARD = 64
#: Of a tensor's name, shape and place in a shard's header.
_HEADER_BYTES = 120
#: Seconds between two looks at what other processes have in hand.
_PAUSE = 0.2


@dataclass(frozen=True)
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
    images_per_shard: int = IMAGES_PER_SHARD,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> Cached:
    """Cache the VAE moments of every image of a run. Called by all processes of torchrun alike.

    It may be killed at any time and started again, with any number of processes: the shards come out the same. Several
    runs may fill one folder at once.

    Args:
        config: the training's settings: the data, the model folder, the device, ``dtype`` of products,
            ``num_workers`` threads that decode.
        out: folder of the cache; by default the settings' ``latent_cache``.
        overrides: settings that overrule those of the file.
        dtype: of the moments on disk, ``float32`` or ``bfloat16``.
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
    groups, encoder = _prepare(settings, processes, device, dtype)
    result = _Run(settings, store_folder(folder, encoder.identity.kind), groups, encoder, processes, speak).work(
        images_per_shard, dry_run
    )
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
    settings: RunConfig, processes: Processes, device: torch.device, dtype: str
) -> tuple[list[SourceGroup], Encoder]:
    """The data and the VAE of a run."""
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
    return groups, VaeEncoder(vae, vae_identity(vae, fingerprint, products, dtype))


@dataclass
class _Run:
    settings: RunConfig
    folder: Path
    groups: Sequence[SourceGroup]
    encoder: Encoder
    processes: Processes
    speak: Callable[[str], None] | None

    def work(self, images_per_shard: int, dry_run: bool) -> Cached:
        identity, processes = self.encoder.identity, self.processes
        sources = cacheable(self.groups)
        survey = self._survey(sources)
        items = survey.items[identity.kind]
        num_bytes = _num_bytes(identity, items["key"])
        known = LatentStore(self.folder).index.has(items["key"]) if (self.folder / "identity.json").exists() else []
        missing = items["key"][~np.asarray(known, dtype=bool)] if len(known) else items["key"]
        to_write = _num_bytes(identity, missing)
        self._announce(survey, len(items), num_bytes, len(missing), to_write)
        if dry_run:
            return Cached(len(items), num_bytes, 0, 0.0, survey.failures)
        units: list[Unit] = []
        if processes.rank == 0:
            open_store(self.folder, identity, _rules(sources, identity.kind))
            _require_room(self.folder, to_write)
            units = list_units(self.folder, identity, items["key"], images_per_shard)
        units = processes.broadcast(units)
        num_encoded = sum(len(unit.keys) for unit in units if not is_done(self.folder, unit))
        started = time.monotonic()
        failures = self._fill(units, sources, items)
        for found in processes.gather(failures):
            survey.failures.merge(found)
        if processes.rank == 0:
            close_store(self.folder, identity)
        result = Cached(len(items), num_bytes, num_encoded, time.monotonic() - started, survey.failures)
        self._conclude(result)
        return result

    def _survey(self, sources: Sequence[GroupRows]) -> Survey:
        data = self.settings.data
        if left_out := [group.name for group in self.groups if not isinstance(group.source, GroupRows)]:
            self._say(f"not cached, their rows are streamed: {', '.join(left_out)}")
        return take_survey(
            sources,
            [self.encoder.identity.kind],
            self.processes,
            max_num_tokens=min(data.max_num_tokens_per_sample, data.max_num_tokens),
            num_threads=max(1, data.num_workers),
            on_progress=Looking(self.speak),
        )

    def _announce(self, survey: Survey, num_images: int, num_bytes: int, num_missing: int, to_write: int) -> None:
        identity = self.encoder.identity
        self._say(
            f"{survey.num_rows:,} rows hold {num_images:,} distinct images and sizes: {size_text(num_bytes)} of "
            f"{ENCODERS[identity.kind]} outputs in {identity.stored}. {num_images - num_missing:,} are in "
            f"{self.folder}, {num_missing:,} to be encoded ({size_text(to_write)})"
        )
        if identity.products == "bfloat16" and identity.stored == "float32":
            self._say("products are bfloat16 in this run: stored in bfloat16 the same values take half the room")
        if survey.num_too_long:
            self._say(f"{survey.num_too_long:,} rows are longer than max_num_tokens_per_sample: left out")

    def _fill(self, units: Sequence[Unit], sources: Sequence[GroupRows], items: np.ndarray) -> Failures:
        processes = self.processes
        progress = Progress(self.folder, units, self.speak)
        threads = max(1, self.settings.data.num_workers)
        first = len(units) * processes.rank // processes.world_size

        def wait() -> None:
            progress.tick()
            time.sleep(_PAUSE)

        with contextlib.closing(Filler(self.folder, self.encoder, sources, items, threads, progress)) as filler:
            do_units(self.folder, units, filler, first, wait)
        return filler.failures

    def _conclude(self, result: Cached) -> None:
        rate = f", {result.num_encoded / result.seconds:.1f} images/s" if result.seconds and result.num_encoded else ""
        self._say(
            f"{self.folder}: {result.num_images:,} images, {size_text(result.num_bytes)}; {result.num_encoded:,} "
            f"encoded in {duration(result.seconds)}{rate}"
        )
        if result.failures.counts:
            self._say(f"not cached, training counts them as bad rows:\n{result.failures.describe()}")

    def _say(self, text: str) -> None:
        if self.speak is not None:
            self.speak(text)


def _num_bytes(identity: Identity, keys: np.ndarray) -> int:
    """On disk, headers included."""
    return sum(identity.num_bytes(key) + _HEADER_BYTES for key in as_bytes(keys))


def _rules(sources: Sequence[GroupRows], kind: str) -> list[Mapping[str, Any]]:
    return [rule for source in sources if (rule := source.resize_rules().get(kind)) is not None]


def _require_room(folder: Path, num_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise DataError(
            f"{folder} needs {size_text(num_bytes)} more, {size_text(free)} are free. Choose another --out, or --dtype "
            "bfloat16, which takes half the room."
        )


# ---------------------------------------------------------------- training


def use_cache(
    settings: RunConfig,
    groups: Sequence[SourceGroup],
    vae: AutoEncoder | None,
    vae_path: Path | None,
    products: torch.dtype,
    processes: Processes,
) -> LatentCache | None:
    """Let the sources take from ``latent_cache`` what is there. Called by all ranks alike, before any worker starts.

    Raises:
        DataError: if there is no cache, or it was made with another VAE, other products or other resize rules.
    """
    folder = settings.data.latent_cache
    if not folder or vae is None or vae_path is None:
        return None
    fingerprint = processes.broadcast(file_fingerprint(vae_path) if processes.rank == 0 else "")
    store = LatentStore(store_folder(Path(folder).expanduser().resolve(), "vae_image"))
    store.require(vae_identity(vae, fingerprint, products))
    sources = {group.name: group.source for group in groups if isinstance(group.source, GroupRows)}
    rules = {name: source.resize_rules().get("vae_image") for name, source in sources.items()}
    store.require_rules({name: rule for name, rule in rules.items() if rule is not None})
    logger.info("latent_cache %s holds %d images", folder, len(store.index))
    cache = LatentCache({"vae_image": store}, settings.data.latent_cache_strict)
    for source in sources.values():
        source.cache = cache
    return cache
