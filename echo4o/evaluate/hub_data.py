"""Benchmark data of the Hugging Face hub: parquet and arrow rows with images in them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from echo4o.checkpoint.hub import patiently
from echo4o.checkpoint.hub_errors import first_cause, in_words, is_of_the_hub, quiet_requests
from echo4o.evaluate.benchmark import BenchmarkDataError

TABLES = ("*.parquet", "*.arrow")
_SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


def hub_folder(name: str, patterns: Sequence[str] = TABLES) -> Path:
    """The files of a data set on the hub, downloaded into its cache where they are not yet.

    Raises:
        BenchmarkDataError: if the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    patterns = [*patterns, *(f"**/{pattern}" for pattern in patterns)]

    def fetch() -> str:
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)

    try:
        with quiet_requests():
            return Path(patiently(fetch))
    except Exception as error:  # of several libraries, with the token's request in some: only our words leave
        if not is_of_the_hub(error):
            raise
        reason = in_words(first_cause(error), name, None)
        raise BenchmarkDataError(f"the data set {name}: {reason}; or pass a folder that holds it") from None


def image_folder(name: str) -> Path:
    """Where images out of the data set's rows are kept, beside the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "echo4o" / name.replace("/", "--")


def table_files(folder: Path) -> list[Path]:
    """The parquet files below the folder in order, else its arrow files; those that `datasets` caches are left out."""
    for pattern in TABLES:
        files = sorted(path for path in Path(folder).rglob(pattern) if not path.name.startswith("cache-"))
        if files:
            return files
    return []


def table_rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row.

    Raises:
        BenchmarkDataError: naming the file that cannot be read.
    """
    for path in files:
        number = 0
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import ipc, parquet

    try:
        if path.suffix == ".parquet":
            yield from parquet.ParquetFile(path).iter_batches(batch_size=16)
            return
        try:
            yield from ipc.open_stream(path)  # what `save_to_disk` writes
        except pa.ArrowInvalid:
            reader = ipc.open_file(path)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    except (OSError, pa.ArrowException) as error:
        raise BenchmarkDataError(f"cannot read {path}: {error}") from error


def stored_image(value: Any, folder: Path, stem: str, place: str) -> Path:
    """The image of a row as a file ``{folder}/{stem}.{suffix}``; its bytes as they are, unlike upstream's JPEG.

    Args:
        value: ``{"bytes": …, "path": …}`` as `datasets` stores images, or bytes.

    Raises:
        BenchmarkDataError: if it is no image.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BenchmarkDataError(f"{place}: no image but {type(data).__name__}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            form = str(image.format)
    except Exception as error:  # PIL raises a dozen kinds
        raise BenchmarkDataError(f"{place}: no image ({error})") from error
    path = folder / (stem + _SUFFIX.get(form, f".{form.lower()}"))
    if path.is_file() and path.stat().st_size == len(data):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)
    return path
