"""Model folders by name: a folder on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from echo4o.checkpoint.hub_errors import first_cause, in_words, is_of_the_hub, is_passing, quiet_requests, status_of

T = TypeVar("T")

#: What belongs to a model; weights in other formats and pictures are not fetched. Its code is: nothing here runs it,
#: but `transformers` may, and verification looks for it.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
#: The state of a training run, which no model needs.
TRAINING_STATE = ("optimizer*", "*/optimizer*", "ranks/*", "*/ranks/*", "*.pt", "*.bin")
#: Seconds to wait before a transfer that broke off is taken up again.
PAUSES = (1.0, 5.0)
#: Seconds to wait for the hub's first answer.
PATIENCE = 10.0
_REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")
_IN_CACHE = re.compile(r"models--(.+?)--(.+)")


class HubError(FileNotFoundError):
    """The hub does not give a model, or a name is none; the message names the fix."""


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder itself if it is there, else that of a hub repository (``ByteDance-Seed/BAGEL-7B-MoT``, or
    ``owner/name@revision``), downloaded into the hub's cache where it is not yet. Without a network the cache serves.

    Args:
        revision: branch, tag or commit of a repository; None takes its ``main``.

    Raises:
        HubError (a FileNotFoundError): if it is neither, or the hub does not give it.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"{model} is a folder here and has no revisions; leave {revision!r} out")
        return folder
    name, stated = split_name(model)
    if revision is not None and stated not in (None, revision):
        raise HubError(f"{model} and revision {revision!r} name two revisions; leave one out")
    try:
        with quiet_requests():
            return _download(name, revision or stated)
    except HubError:
        raise
    except Exception as error:  # of several libraries, with the token's request in some: only our words leave
        if not is_of_the_hub(error):
            raise
        raise HubError(
            f"{model} is no folder here, and: {in_words(first_cause(error), name, revision or stated)}"
        ) from None


def split_name(model: str | Path) -> tuple[str, str | None]:
    """(owner/name, revision or None) of a repository's name.

    Raises:
        HubError: if it cannot be one, or looks like the path of a folder that is not there.
    """
    text = str(model)
    found = _REPOSITORY.fullmatch(text)
    if found is None:
        raise HubError(f"{model} is not a folder; pass a BAGEL folder, a checkpoint of a run, or owner/name")
    owner = text.partition("/")[0]
    if owner == "hf" and found[2] is None:  # where upstream's commands have their folders
        raise HubError(
            f"{model} is not a folder; download the model there, or pass its name on the hub, for example "
            "ByteDance-Seed/BAGEL-7B-MoT"
        )
    if found[2] is None and Path(owner).is_dir():
        raise HubError(
            f"{model} is not a folder, though {owner} is one; correct the path, or write {model}@main for the hub's"
        )
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(found[1])
    except HFValidationError as error:
        raise HubError(f"{model} is not a folder, and cannot be a name on the hub: {error}") from None
    return found[1], found[2]


def repository_of(folder: str | Path) -> tuple[str, str] | None:
    """(owner/name, commit) of a folder in the hub's cache; None for other folders."""
    folder = Path(folder)
    found = _IN_CACHE.fullmatch(folder.parent.parent.name)
    if folder.parent.name != "snapshots" or found is None:
        return None
    return f"{found[1]}/{found[2]}", folder.name


def published_name(folder: str | Path) -> str:
    """``owner/name@commit`` of a folder in the hub's cache, which others can use too; other folders' absolute path."""
    found = repository_of(folder)
    return "@".join(found) if found else str(Path(folder).resolve())


def cached_folder(name: str, revision: str | None = None) -> Path:
    """Where the cache has a repository; nothing is asked of the hub.

    Raises:
        HubError: if it has not all of it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **_patterns()))
    except OSError as error:
        raise HubError(in_words(error, name, revision)) from None


def size_text(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; it is called again after a pause if the connection broke or the hub was busy."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            if pause is None or not is_passing(error):
                raise
            print(f"the hub: {type(error).__name__}; again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- download


def _patterns() -> dict[str, Any]:
    return {"allow_patterns": list(FILES), "ignore_patterns": list(TRAINING_STATE)}


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted, missing, commit = _listing(name, revision)
    except Exception as error:
        if not is_passing(error):
            raise
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, **_patterns()))
        print(f"{name}: the hub does not answer; commit {folder.name[:10]} of the cache", file=sys.stderr, flush=True)
        return folder
    options = _patterns()
    if missing:
        _announce(name, commit, wanted, missing)
    else:
        options["tqdm_class"] = _no_bar()
    return Path(patiently(lambda: snapshot_download(name, revision=revision, **options)))


def _no_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return Silent


def _listing(name: str, revision: str | None) -> tuple[dict[str, int], dict[str, int], str]:
    """(files → bytes, those of them that the cache lacks, commit).

    Raises:
        HubError: if there is nothing of a model.
        HfHubHTTPError, and errors of the connection.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    def ask():
        return HfApi().model_info(name, revision=revision, files_metadata=True, timeout=PATIENCE)

    try:
        info = ask()
    except Exception as error:
        if status_of(error) is None or not is_passing(error):  # offline, the cache serves at once
            raise
        info = patiently(ask)
    files = {file.rfilename: file for file in info.siblings or []}
    names = list(filter_repo_objects(files, **_patterns()))
    if not any(name.endswith((".json", ".safetensors")) for name in names):
        raise HubError(f"{name} on the hub holds no model: {', '.join(sorted(files)[:5]) or 'no files'}")
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    missing = {}
    for path in names:
        file = files[path]
        blob = cache / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)
        if not blob.exists() and not (cache / "snapshots" / str(info.sha) / path).exists():
            missing[path] = file.size or 0
    return {path: files[path].size or 0 for path in names}, missing, str(info.sha)


def _announce(name: str, commit: str, wanted: dict[str, int], missing: dict[str, int]) -> None:
    from huggingface_hub import constants

    size, cache = sum(missing.values()), Path(constants.HF_HUB_CACHE)
    part = "" if len(missing) == len(wanted) else f" ({len(missing)} of {len(wanted)} files; the cache has the others)"
    print(f"{name}, commit {commit[:10]}: {size_text(size)} to download{part} to {cache}", file=sys.stderr, flush=True)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise HubError(
            f"{name} needs {size_text(size)}, and {cache} has {size_text(free)} left: make room there, or set HF_HOME "
            "to a folder on another disk"
        )
