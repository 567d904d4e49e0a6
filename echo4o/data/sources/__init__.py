"""Rows on disk as sources of planned samples."""

from echo4o.data.sources.base import Address, Limits, RowPlan, Source, SourceContext, SourceGroup, item_seed
from echo4o.data.sources.build import build_sources, read_dataset_config

__all__ = [
    "Address",
    "Limits",
    "RowPlan",
    "Source",
    "SourceContext",
    "SourceGroup",
    "build_sources",
    "item_seed",
    "read_dataset_config",
]
