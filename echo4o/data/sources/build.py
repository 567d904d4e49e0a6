"""Upstream's dataset YAML → sources. Paths come from ``dataset_info``; everything is checked before the first row."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from echo4o.data.errors import DataError
from echo4o.data.images import DEFAULT_PIXEL_LIMIT, ImageTransform
from echo4o.data.sources.base import SourceContext, SourceGroup
from echo4o.data.sources.drafts import Drafter
from echo4o.data.sources.edit import EditPlanner
from echo4o.data.sources.multi_ref import MultiRefOptions, MultiRefPlanner
from echo4o.data.sources.node_cache import NodeCache
from echo4o.data.sources.rows import DataSet, GroupRows, RowPlanner
from echo4o.data.sources.settings import boolean, check_key, check_type, whole, wrong
from echo4o.data.sources.shares import DROPOUT_KEYS, SHARE_KEYS, read_dropout, read_share, read_weight_by
from echo4o.data.sources.stores import ENTRY_KEYS, FORMAT_KEYS, StoreOpener
from echo4o.data.sources.subset import SUBSET_KEYS, Subset, check_splits
from echo4o.data.sources.t2i import T2IPlanner
from echo4o.data.sources.video import FrameSampler
from echo4o.data.sources.vlm import VlmPlanner

_log = logging.getLogger(__name__)

KINDS = ("t2i_pretrain", "unified_edit", "multi_ref", "vlm_sft")
_GROUP_KEYS = [
    "type",
    "dataset_names",
    "num_used_data",
    *SHARE_KEYS,
    *DROPOUT_KEYS,
    *SUBSET_KEYS,
    "is_mandatory",
    "image_transform_args",
    "vit_image_transform_args",
    "frame_sampler_args",
    "shuffle_lines",
    "shuffle_seed",
    "resume_data_status",
    "image_pixel_limit",
]
_MULTI_REF_KEYS = [field.name for field in dataclasses.fields(MultiRefOptions)]

# Upstream's shipped values, for groups that leave the transforms out.
_VAE_TRANSFORM = {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512}
_VIT_TRANSFORM = {"image_stride": 14, "max_image_size": 518, "min_image_size": 224}
_VLM_TRANSFORM = {"image_stride": 14, "max_image_size": 980, "min_image_size": 378, "max_pixels": 2007040}


def read_dataset_config(path: str | Path) -> dict[str, Any]:
    """The dataset YAML as a dictionary.

    Raises:
        DataError: if it is missing or no mapping of groups.
    """
    return _read_mapping(Path(path), "the dataset config")


def build_sources(dataset_config: Mapping[str, Any], context: SourceContext) -> list[SourceGroup]:
    """Every group of a dataset config, in its order.

    Args:
        dataset_config: group → settings, as upstream's YAML; ``dataset_info`` and ``weight_by`` may stand in it.
        context: model limits, tokenizer, seed, and where paths start.

    Raises:
        DataError: on an unknown or wrong setting, a missing file, or a data set without rows.
    """
    settings = dict(dataset_config)
    info, info_dir = _dataset_info(settings.pop("dataset_info", None), context)
    weight_by = read_weight_by(settings.pop("weight_by", "samples"), "weight_by")
    if not settings:
        raise DataError(f"the dataset config has no groups; known: {', '.join(KINDS)}")
    built, cache = [], NodeCache(context.cache_dir) if context.cache_dir else None
    for name, group in settings.items():
        if not isinstance(group, Mapping):
            check_key(name, (*KINDS, "dataset_info", "weight_by"), f"{name!r} in the dataset config")
            raise DataError(f"{name} in the dataset config must be a mapping with dataset_names, weight, …")
        built.append(_GroupBuilder(str(name), group, info, info_dir, context, cache, weight_by).build())
    check_splits([(subset, files) for _, subset, files in built])
    return [group for group, _, _ in built]


@dataclass(frozen=True)
class _GroupBuilder:
    name: str
    settings: Mapping[str, Any]
    info: Mapping[str, Any]
    info_dir: Path
    context: SourceContext
    cache: NodeCache | None
    weight_by: str

    def build(self) -> tuple[SourceGroup, Subset, set[str]]:
        """The group, how its rows are chosen, and the files they are chosen from."""
        kind = self.settings.get("type", self.name)
        check_key(kind, KINDS, f"kind of data {kind!r} of group {self.name!r} in the dataset config")
        allowed = [*_GROUP_KEYS, *_MULTI_REF_KEYS] if kind == "multi_ref" else _GROUP_KEYS
        for key in self.settings:
            check_key(key, allowed, f"{self.name}.{key} in the dataset config")
        planner, dropout = self._planner(kind), read_dropout(self.name, self.settings)
        names = self.settings.get("dataset_names")
        if not names or not isinstance(names, list):
            raise DataError(f"{self.name} needs dataset_names: a list of entries of dataset_info")
        data_sets = [
            self._data_set(kind, str(name), num_used, planner.columns)
            for name, num_used in zip(names, self._num_used(len(names)), strict=True)
        ]
        subset = Subset.read(self.name, self.settings, len(names))
        files = {str(file) for part in data_sets for file in getattr(part.store, "files", ())}
        data_sets = subset.of(data_sets, planner.columns)
        pixel_limit = self.settings.get("image_pixel_limit", DEFAULT_PIXEL_LIMIT)
        pixel_limit = whole(pixel_limit, f"{self.name}.image_pixel_limit")
        rows = GroupRows(self.name, data_sets, planner, self.context.data_seed, pixel_limit, dropout)
        group = SourceGroup(
            self.name,
            rows,
            **read_share(self.name, self.settings, self.weight_by),
            subset=subset.describe(),
            is_mandatory=self._boolean("is_mandatory", False),
            resume_data_status=self._boolean("resume_data_status", True),
        )
        return group, subset, files

    def _boolean(self, key: str, default: bool) -> bool:
        return boolean(self.settings.get(key, default), f"{self.name}.{key}")

    def _planner(self, kind: str) -> RowPlanner:
        context = self.context
        if kind == "vlm_sft":
            if not context.visual_und:
                raise DataError(f"{self.name} needs the understanding branch: set visual_und or remove the group")
            drafter = Drafter(context.tokenizer, context.limits, vit_transform=self._vit("image", _VLM_TRANSFORM))
            return VlmPlanner(drafter, _build(FrameSampler, self._mapping("frame_sampler_args"), self.name))
        if not context.visual_gen:
            raise DataError(f"{self.name} needs the generation branch: set visual_gen or remove the group")
        vae = self._transform("image", _VAE_TRANSFORM, context.limits.latent_downsample)
        if kind == "t2i_pretrain":
            return T2IPlanner(Drafter(context.tokenizer, context.limits, vae))
        vit = self._vit("vit_image", _VIT_TRANSFORM)
        drafter = Drafter(context.tokenizer, context.limits, vae, vit)
        if kind == "unified_edit":
            return EditPlanner(drafter, context.visual_und)
        settings = {key: self.settings[key] for key in _MULTI_REF_KEYS if key in self.settings}
        options: MultiRefOptions = _build(MultiRefOptions, settings, self.name)
        smallest = max(vae.image_stride, vit.image_stride) ** 2
        if any(budget < smallest for budget in options.max_pixels_by_num_refs):
            raise DataError(
                f"{self.name}.max_pixels_by_num_refs is {settings['max_pixels_by_num_refs']}: a budget below one patch "
                f"of the image transforms, {smallest} pixels, cannot be met"
            )
        return MultiRefPlanner(drafter, options, context.visual_und)

    def _vit(self, prefix: str, defaults: Mapping[str, int]) -> ImageTransform:
        return self._transform(prefix, defaults, self.context.limits.vit_patch_size)

    def _transform(self, prefix: str, defaults: Mapping[str, int], patch: int) -> ImageTransform:
        key = f"{prefix}_transform_args"
        transform = _build(ImageTransform, self._mapping(key) or defaults, f"{self.name}.{key}")
        if transform.image_stride % patch:
            raise DataError(
                f"{self.name}.{key}.image_stride is {transform.image_stride}, but the model cuts images into patches "
                f"of {patch} px; use a multiple of {patch}"
            )
        return transform

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self.settings.get(key) or {}
        if not isinstance(value, Mapping):
            raise DataError(f"{self.name}.{key} must be a mapping, not {value!r}")
        return value

    def _num_used(self, num_names: int) -> list[int | None]:
        used, place = self.settings.get("num_used_data"), f"{self.name}.num_used_data"
        used = [used] * num_names if used is None or isinstance(used, int) else used
        if not isinstance(used, list):
            raise wrong(used, place, "a whole number, or a list of one for each of dataset_names")
        if len(used) != num_names:
            raise DataError(f"{place} has {len(used)} numbers for {num_names} dataset_names")
        return [None if number is None else whole(number, place) for number in used]

    def _data_set(self, kind: str, name: str, num_used: int | None, columns: Sequence[str]) -> DataSet:
        group = self.info.get(self.name, self.info.get(kind))
        if not isinstance(group, Mapping):
            raise DataError(
                f"dataset_info has no group {self.name!r} (it has: {', '.join(map(str, self.info)) or 'nothing'}).\n"
                f"  Add to the dataset YAML:  dataset_info: {{{self.name}: {{{name}: {{data_dir: …}}}}}}"
            )
        check_key(name, group, f"data set {name!r} of dataset_info.{self.name}")
        entry = group[name]
        place = f"dataset_info.{self.name}.{name}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{place} must be a mapping with data_dir, jsonl_path, or format and path, not {entry!r}")
        for key in entry:
            check_key(key, (*ENTRY_KEYS, *FORMAT_KEYS), f"{place}.{key}")
        store, image_folder = self._opener().open(place, entry, num_used, columns)
        _log.info("%s: %d rows in %d files", place, len(store), len(set(store.files)))  # type: ignore[attr-defined]
        return DataSet(name, store, image_folder)

    def _opener(self) -> StoreOpener:
        shuffled = self._boolean("shuffle_lines", False)
        shuffle_seed = whole(self.settings.get("shuffle_seed", 0), f"{self.name}.shuffle_seed", at_least=0)
        return StoreOpener(
            self.settings.get("type", self.name),
            self.info_dir,
            self.cache,
            self.context.cache_dir,
            self.context.max_bad_file_share,
            shuffle_seed if shuffled else None,
            self._boolean("allow_no_references", False),
        )


def _dataset_info(inline: Any, context: SourceContext) -> tuple[Mapping[str, Any], Path]:
    """dataset_info from the context (argument) or the YAML, and the folder its relative paths start from."""
    info = context.dataset_info if context.dataset_info is not None else inline
    base_dir = Path(context.base_dir)
    if isinstance(info, str | Path):
        path = base_dir / Path(info).expanduser()
        return _read_mapping(path, "dataset_info"), path.parent
    if not isinstance(info, Mapping):
        raise DataError(
            "no dataset_info: say in the dataset YAML (or a file given as dataset_info) where the data lies:\n"
            "  dataset_info:\n    multi_ref:\n      my_data: {data_dir: path/to/parquet}"
        )
    return info, base_dir


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{what} {path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{what} {path} must be a mapping, not {type(values).__name__}")
    return values


def _build(cls: type, values: Mapping[str, Any], place: str) -> Any:
    """A dataclass from YAML values, refusing unknown, missing and wrong ones."""
    fields = dataclasses.fields(cls)
    for key in values:
        check_key(key, [field.name for field in fields], f"{place}.{key}")
    for field in fields:
        if field.name in values:
            check_type(values[field.name], str(field.type), f"{place}.{field.name}")
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except (TypeError, ValueError, DataError) as error:
        raise DataError(f"{place}: {error}") from error
