"""The dataset.yaml beside converted data: ready for ``echo4o train --dataset_config_file``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from echo4o.data.formats.writers.base import GROUP_OF_KIND, Finishing

_VAE_IMAGES = {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512}
_VIT_IMAGES = {"image_stride": 14, "max_image_size": 518, "min_image_size": 224}
_VLM_IMAGES = {"image_stride": 14, "max_image_size": 980, "min_image_size": 378, "max_pixels": 2007040}


def write_dataset_yaml(
    finishing: Finishing, entries: Mapping[str, Mapping[str, Any]], num_used: Mapping[str, int] | None = None
) -> None:
    """Groups with upstream's transforms, weighted by their rows.

    Args:
        entries: kind → entry of ``dataset_info``, paths relative to the YAML.
        num_used: kind → ``num_used_data``.
    """
    total = sum(summary.rows for summary in finishing.kinds.values())
    info, groups = {}, {}
    for kind, entry in entries.items():
        group, summary = GROUP_OF_KIND[kind], finishing.kinds[kind]
        info[group] = {finishing.name: dict(entry)}
        groups[group] = {
            "dataset_names": [finishing.name],
            "image_transform_args": dict(_VLM_IMAGES if kind == "vlm" else _VAE_IMAGES),
            **({"vit_image_transform_args": dict(_VIT_IMAGES)} if kind in ("multi_ref", "edit") else {}),
            "is_mandatory": len(entries) == 1,
            **({"num_used_data": [num_used[kind]]} if num_used else {}),
            "weight": max(round(summary.rows / total, 4), 0.0001),
            **({"allow_no_references": True} if kind == "multi_ref" and summary.without_references else {}),
        }
    rows = ", ".join(f"{finishing.kinds[kind].rows} rows for {GROUP_OF_KIND[kind]}" for kind in entries)
    text = (
        f"# {rows}. Weights are the shares of rows; change them as you like.\n"
        "# Paths in dataset_info are relative to this file.\n"
        + yaml.safe_dump({"dataset_info": info, **groups}, sort_keys=False, allow_unicode=True)
    )
    finishing.write("dataset.yaml", text)
