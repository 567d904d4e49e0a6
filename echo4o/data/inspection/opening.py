"""A run's YAML, a YAML of data set groups, or a data set as it lies on disk: opened as training would open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from echo4o.config import ConfigError, RunConfig, load_config
from echo4o.data.composition import PackLimits
from echo4o.data.errors import DataError
from echo4o.data.formats import detect, format_named
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.preview import BAGEL_LIMITS, WordTokenizer
from echo4o.data.sources import build_sources
from echo4o.data.sources.base import Limits, SourceContext, SourceGroup
from echo4o.data.tokenizer import SpecialTokens, Tokenizer, add_special_tokens, load_tokenizer

_YAML = (".yaml", ".yml")
#: Kind of record → kind of group.
GROUP_OF = {"t2i": "t2i_pretrain", "multi_ref": "multi_ref", "edit": "unified_edit", "vlm": "vlm_sft"}


@dataclass(frozen=True)
class Opened:
    """Data, with what decides its tokens.

    Attributes:
        groups: as in training.
        packer: with the run's dropout; without a run there is none.
        limits: of a pack.
        run: the settings, where a run's YAML was given.
        tokenizer: of the model; words stand in where there is none (`counts_words`).
        title: what was opened, for headings.
        problems: what the formats found wrong on opening.
    """

    groups: list[SourceGroup]
    packer: Packer
    limits: PackLimits
    run: RunConfig | None
    tokenizer: Tokenizer
    counts_words: bool
    title: str
    problems: tuple[str, ...] = ()

    @property
    def max_num_tokens_per_sample(self) -> int:
        return min(self.limits.max_num_tokens_per_sample, self.limits.max_num_tokens)


def open_data(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    format: str | None = None,
    images: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Opened:
    """Open `path`.

    Args:
        path: run's YAML, YAML of groups, or a data set (`echo4o.data.formats.FORMATS`).
        tokenizer: model folder; by default that of the run's ``init_from``, where it is here.
        format: of a data set; None recognises it.
        images: where a data set's images lie, if not where its format has them.
        cache_dir: where archives are unpacked.

    Raises:
        DataError: if it cannot be opened, with the reason training would give.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in _YAML and format is None and not _is_mix(path):
        run, config_path = _run_of(path)
        folder = Path(tokenizer) if tokenizer else _model_folder(run)
        config, base_dir, info = _read(config_path), config_path.resolve().parent, _info_of(run)
    else:
        run, folder = None, Path(tokenizer) if tokenizer else None
        config, base_dir, info = dataset_config(path, format, images), Path.cwd(), None
    words, special_tokens = _tokenizer(folder)
    context = SourceContext(
        words,
        special_tokens,
        run.data.data_seed if run else 42,
        base_dir,
        _limits(folder),
        dataset_info=info,
        cache_dir=Path(cache_dir).expanduser().resolve() if cache_dir else None,
    )
    groups = build_sources(config, context)
    problems = [line for group in groups for line in getattr(group.source, "problems", ())]
    packer = Packer(_packing(run, special_tokens, context.limits))
    return Opened(groups, packer, _pack_limits(run), run, words, folder is None, path.name, tuple(problems))


def dataset_config(path: Path, format: str | None = None, images: str | Path | None = None) -> dict[str, Any]:
    """The YAML of groups, as a mapping, with which training would read a data set as it lies.

    Raises:
        DataError: if its format is not known or it holds no rows.
    """
    name = format or detect(path)
    fmt = format_named(name)
    entry: dict[str, Any] = {"format": name, "path": str(path.absolute())} | ({"images": str(images)} if images else {})
    config: dict[str, Any] = {"dataset_info": {}}
    for kind in _kinds_in(fmt.open(path, images=images)):
        group = GROUP_OF[kind]
        config["dataset_info"][group] = {path.stem: entry}
        config[group] = {"dataset_names": [path.stem], "weight": 1}
    return config


def _kinds_in(store: Any, looked_at: int = 200) -> list[str]:
    """Kinds of rows of a store, told from rows spread over it."""
    kinds: dict[str, None] = {}
    step = max(1, len(store) // looked_at)
    for row in range(0, len(store), step):
        try:
            kinds[store.kind(row)] = None
        except DataError:
            continue
    if not kinds:
        raise DataError(
            f"none of {len(range(0, len(store), step))} rows looked at says what it is: {store.where(0)[0]}"
        )
    return list(kinds)


def _is_mix(path: Path) -> bool:
    """OmniGen2's YAML mixes are a data set."""
    content = _read(path)
    return set(content) == {"data"} and isinstance(content["data"], list)


def _run_of(path: Path) -> tuple[RunConfig | None, Path]:
    try:
        run = load_config(path)
    except ConfigError as error:
        if "dataset_config_file" in _read(path):
            raise DataError(f"{path}: {error}") from error
        return None, path  # data set groups are no settings
    return run, Path(run.data.dataset_config_file)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds neither data set groups nor settings of a run")
    return content


def _info_of(run: RunConfig | None) -> Path | None:
    return Path(run.data.dataset_info).expanduser().resolve() if run and run.data.dataset_info else None


def _model_folder(run: RunConfig | None) -> Path | None:
    named = run.training.init_from or run.model.model_path if run else None
    return Path(named) if named and Path(named).is_dir() else None


def _tokenizer(folder: Path | None) -> tuple[Tokenizer, SpecialTokens]:
    if folder is None:
        return WordTokenizer(), SpecialTokens(0, 1, 2, 3)
    tokenizer = load_tokenizer(folder)
    return tokenizer, add_special_tokens(tokenizer)


def _limits(folder: Path | None) -> Limits:
    """Grids of the model in `folder`, as its configs state them; BAGEL's where there is none."""
    values: dict[str, Any] = {}
    if folder is not None and (path := folder / "config.json").is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            values = {}
    vae: Mapping[str, Any] = values.get("vae_config") or {}
    downsample = int(vae.get("downsample", 8)) * int(values.get("latent_patch_size", 2))
    return Limits(
        max_latent_size=int(values.get("max_latent_size", BAGEL_LIMITS.max_latent_size)),
        vit_max_num_patch_per_side=int(
            values.get("vit_max_num_patch_per_side", BAGEL_LIMITS.vit_max_num_patch_per_side)
        ),
        latent_downsample=downsample,
        interpolate_pos=bool(values.get("interpolate_pos", False)),
    )


def _packing(run: RunConfig | None, special_tokens: SpecialTokens, limits: Limits) -> PackingConfig:
    dropout = {
        name: getattr(run.model, name)
        for name in (
            "text_cond_dropout_prob",
            "vae_cond_dropout_prob",
            "vit_cond_dropout_prob",
            "all_refs_dropout_prob",
        )
        if run
    }
    return PackingConfig(
        bos_token_id=special_tokens.bos_token_id,
        eos_token_id=special_tokens.eos_token_id,
        start_of_image=special_tokens.start_of_image,
        end_of_image=special_tokens.end_of_image,
        latent_downsample=limits.latent_downsample,
        max_latent_size=limits.max_latent_size,
        vit_patch_size=limits.vit_patch_size,
        vit_max_num_patch_per_side=limits.vit_max_num_patch_per_side,
        interpolate_pos=limits.interpolate_pos,
        **dropout,
    )


def _pack_limits(run: RunConfig | None) -> PackLimits:
    if run is None:
        return PackLimits()
    return PackLimits(
        expected_num_tokens=run.training.expected_num_tokens,
        max_num_tokens=run.data.max_num_tokens,
        max_num_tokens_per_sample=run.data.max_num_tokens_per_sample,
        prefer_buffer_before=run.data.prefer_buffer_before,
        max_buffer_size=run.data.max_buffer_size,
    )
