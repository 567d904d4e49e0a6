"""The data side of a run: tokenizer, sources and loader, fitted to the model's grids and token ids."""

from __future__ import annotations

from pathlib import Path

from echo4o.config import LoadPlan, RunConfig
from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sources import build_sources, read_dataset_config
from echo4o.data.sources.base import Limits, SourceContext, SourceGroup
from echo4o.data.tokenizer import SpecialTokens, Tokenizer, add_special_tokens, load_tokenizer
from echo4o.model import BagelConfig
from echo4o.train.engine import Engine


def build_tokenizer(plan: LoadPlan) -> tuple[Tokenizer, SpecialTokens]:
    """The tokenizer of the model folder (of the language model's, when assembled from parts), markers added."""
    folder = plan.configs_from or plan.from_parts[0]  # type: ignore[index]
    tokenizer = load_tokenizer(folder)
    return tokenizer, add_special_tokens(tokenizer)


def build_groups(
    config: RunConfig, architecture: BagelConfig, tokenizer: Tokenizer, special_tokens: SpecialTokens
) -> list[SourceGroup]:
    """Every group of the dataset YAML; its paths are relative to it, those of settings to the working directory.

    Raises:
        DataError: if the YAML or the data it names cannot be used.
    """
    path = Path(config.data.dataset_config_file)
    context = source_context(config, architecture, tokenizer, special_tokens, path, config.data.data_seed)
    return build_sources(read_dataset_config(path), context)


def source_context(
    config: RunConfig,
    architecture: BagelConfig,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens,
    path: Path,
    data_seed: int,
) -> SourceContext:
    """What the groups of a YAML at `path` need to know of the run and its model."""
    info, cache_dir = config.data.dataset_info, config.data.data_cache_dir
    return SourceContext(
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        data_seed=data_seed,
        base_dir=path.resolve().parent,
        limits=Limits(
            max_latent_size=architecture.max_latent_size,
            vit_max_num_patch_per_side=architecture.vit_max_num_patch_per_side,
            latent_downsample=architecture.latent_downsample if architecture.vae else 16,
            vit_patch_size=architecture.vit.patch_size if architecture.vit else config.model.vit_patch_size,
            interpolate_pos=architecture.interpolate_pos,
        ),
        dataset_info=Path(info).expanduser().resolve() if info else None,
        visual_gen=architecture.visual_gen,
        visual_und=architecture.visual_und,
        cache_dir=Path(cache_dir).expanduser().resolve() if cache_dir else None,
    )


def build_loader(
    config: RunConfig,
    architecture: BagelConfig,
    special_tokens: SpecialTokens,
    groups: list[SourceGroup],
    engine: Engine,
    packs_per_rank: int = 1,
) -> PackedLoader:
    """The stream of packed batches for this rank, which takes `packs_per_rank` of them an optimiser step."""
    data = config.data
    packer = Packer(packing_config(config, architecture, special_tokens))
    loader_config = LoaderConfig(
        expected_num_tokens=config.training.expected_num_tokens,
        max_num_tokens=data.max_num_tokens,
        max_num_tokens_per_sample=data.max_num_tokens_per_sample,
        prefer_buffer_before=data.prefer_buffer_before,
        max_buffer_size=data.max_buffer_size,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        data_seed=data.data_seed,
        max_bad_row_share=data.max_bad_row_share,
        pin_memory=engine.device.type == "cuda",
    )
    return PackedLoader(groups, packer, loader_config, engine.rank, engine.world_size, packs_per_rank)


def packing_config(config: RunConfig, architecture: BagelConfig, special_tokens: SpecialTokens) -> PackingConfig:
    """Token ids, grids and dropout of the run."""
    model = config.model
    return PackingConfig(
        bos_token_id=special_tokens.bos_token_id,
        eos_token_id=special_tokens.eos_token_id,
        start_of_image=special_tokens.start_of_image,
        end_of_image=special_tokens.end_of_image,
        latent_downsample=architecture.latent_downsample if architecture.vae else 16,
        latent_patch_size=architecture.latent_patch_size,
        max_latent_size=architecture.max_latent_size,
        vit_patch_size=architecture.vit.patch_size if architecture.vit else model.vit_patch_size,
        vit_max_num_patch_per_side=architecture.vit_max_num_patch_per_side,
        interpolate_pos=architecture.interpolate_pos,
        text_cond_dropout_prob=model.text_cond_dropout_prob,
        vae_cond_dropout_prob=model.vae_cond_dropout_prob,
        vit_cond_dropout_prob=model.vit_cond_dropout_prob,
        all_refs_dropout_prob=model.all_refs_dropout_prob,
    )
