"""A cache in training: does it fit the run, and who takes from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from echo4o.checkpoint.slices import LayeredReader
from echo4o.config import RunConfig
from echo4o.data.latent_cache import IDENTITY, Identity, LatentCache, LatentStore, store_folder
from echo4o.data.sources.base import SourceGroup
from echo4o.data.sources.rows import GroupRows
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder
from echo4o.train.caching.encoders import file_fingerprint, vae_identity
from echo4o.train.caching.vision import is_frozen, vit_identity
from echo4o.train.processes import Processes

logger = logging.getLogger(__name__)


def use_cache(
    settings: RunConfig,
    groups: Sequence[SourceGroup],
    vae: tuple[AutoEncoder | None, Path | None],
    vit: tuple[Bagel, LayeredReader | None],
    products: torch.dtype,
    processes: Processes,
) -> LatentCache | None:
    """Let the sources take from ``latent_cache`` what is there. Called by all ranks alike, before any worker starts.

    Args:
        vae: of the run, and its file.
        vit: the run's model, of which it is settled what trains and in which dtype, and the reader of its weights.
        products: dtype of matrix products.

    Raises:
        DataError: if there is no cache, or it was made with other encoders, other products or other resize rules.
    """
    folder, (autoencoder, path), (model, reader) = settings.data.latent_cache, vae, vit
    if not folder or autoencoder is None or path is None:
        return None
    cache = Path(folder).expanduser().resolve()
    fingerprint = processes.broadcast(file_fingerprint(path) if processes.rank == 0 else "")
    stores = {"vae_image": _store(cache, vae_identity(autoencoder, fingerprint, products), groups)}
    if is_frozen(model) and (store_folder(cache, "vit_image") / IDENTITY).exists():
        identity = processes.broadcast(vit_identity(model, reader, products) if processes.rank == 0 else None)
        assert identity is not None
        stores["vit_image"] = _store(cache, identity, groups)
    for kind, store in stores.items():
        logger.info("latent_cache %s: %d %s outputs", cache, len(store.index), kind.removesuffix("_image"))
    found = LatentCache(stores, settings.data.latent_cache_strict)
    for group in groups:
        if isinstance(group.source, GroupRows):
            group.source.cache = found
    return found


def _store(cache: Path, identity: Identity, groups: Sequence[SourceGroup]) -> LatentStore:
    store = LatentStore(store_folder(cache, identity.kind))
    store.require(identity)
    sources = {group.name: group.source for group in groups if isinstance(group.source, GroupRows)}
    rules = {name: source.resize_rules().get(identity.kind) for name, source in sources.items()}
    store.require_rules({name: rule for name, rule in rules.items() if rule is not None})
    return store
