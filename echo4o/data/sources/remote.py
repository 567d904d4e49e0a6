"""Data behind fsspec URLs (``hf://``, ``s3://``, ``memory://``, …): listed, read in place, or fetched once."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.sources.node_cache import locked

_log = logging.getLogger(__name__)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_CHUNK_BYTES = 1 << 24


def is_url(place: Any) -> bool:
    """Whether a path is an fsspec URL, ``file://`` included."""
    return isinstance(place, str) and _URL.match(place) is not None


def local_or_url(place: str, base: Path | None = None) -> Path | str:
    """A path as given in a YAML or on the command line: absolute if local, unchanged if it is a URL.

    ``file://`` URLs are local paths. Relative paths start at `base` (default: the working directory).
    """
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    if is_url(place):
        return place
    path = Path(place).expanduser()
    return (base / path if base is not None else path).absolute()


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        DataError: if the protocol is unknown or its package is not installed; the message names what is missing.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot open {url}: {error}") from error


def list_files(url: str, suffixes: Sequence[str] = ()) -> list[str]:
    """URLs of all files at and below a URL, by name, hidden ones left out.

    Raises:
        DataError: if there is nothing or it cannot be listed.
    """
    system, path = file_system(url)
    try:
        if system.isfile(path):
            return [url]
        found = system.find(path)
    except Exception as error:  # every kind of remote storage has errors of its own
        raise DataError(f"cannot list {url}: {error}") from error
    if not found:
        raise DataError(f"{url} does not exist or is empty")
    root = path.rstrip("/")
    names = sorted(name[len(root) :].lstrip("/") for name in found)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    wanted = [name for name in names if not suffixes or name.lower().endswith(tuple(suffixes))]
    return [f"{url.rstrip('/')}/{name}" for name in wanted]


def cache_folder(near: Path | None, chosen: Path | None) -> Path:
    """A folder for unpacked and fetched files: `chosen`, else ``.echo4o_cache`` in `near`, else the user's.

    Raises:
        DataError: if none of them can be written.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo4o"
    beside = [near / ".echo4o_cache"] if near is not None else []
    candidates = [chosen] if chosen is not None else [*beside, user, Path(tempfile.gettempdir()) / "echo4o_cache"]
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise DataError(f"no cache folder can be written: {', '.join(map(str, candidates))}; set --data_cache_dir")


def fetched(url: str, folder: Path) -> Path:
    """A local copy of a remote file, made once by whichever process comes first and complete when it has its name.

    Raises:
        DataError: if it cannot be read, or there is no room for it.
    """
    system, path = file_system(url)
    try:
        info = system.info(path)
    except Exception as error:  # every kind of remote storage has errors of its own
        raise DataError(f"cannot read {url}: {error}") from error
    version = [str(info.get(key)) for key in ("size", "ETag", "etag", "mtime", "last_modified", "blob_id", "created")]
    digest = hashlib.blake2b("\0".join([url, *version]).encode(), digest_size=12).hexdigest()
    name = url.rstrip("/").rpartition("/")[2][-80:]
    copy = folder / f"{digest}-{name}"
    if copy.exists():
        return copy
    with locked(folder / f".{digest}.lock"):
        if copy.exists():
            return copy
        for left_over in folder.glob(f".{digest}.*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        size = info.get("size")
        if size and shutil.disk_usage(folder).free < size:
            raise DataError(f"{url} has {size / 1e6:.0f} MB; {folder} has less room: set --data_cache_dir")
        partial, started = folder / f".{digest}.{uuid.uuid4().hex}.partial", time.perf_counter()
        try:
            with system.open(path, "rb") as reader, partial.open("xb") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
                writer.flush()
                os.fsync(writer.fileno())
            if size is not None and partial.stat().st_size != size:
                raise DataError(f"{url} broke off at {partial.stat().st_size} of {size} bytes; start again")
            partial.rename(copy)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"cannot fetch {url}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        seconds = max(time.perf_counter() - started, 1e-9)
        megabytes = copy.stat().st_size / 1e6
        _log.info("fetched %s (%.0f MB in %.1f s, %.0f MB/s)", url, megabytes, seconds, megabytes / seconds)
    return copy
