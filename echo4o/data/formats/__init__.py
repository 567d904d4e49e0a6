"""Data sets as they are published: opened, recognised, read as records or directly in training."""

from echo4o.data.formats.record import Record, StoredImage, training_row
from echo4o.data.formats.registry import FORMATS, Format, FormatStore, detect, format_named

__all__ = ["FORMATS", "Format", "FormatStore", "Record", "StoredImage", "detect", "format_named", "training_row"]
