"""Model folders by name: a folder on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

#: What a model needs; weights in other formats, pictures and code are not fetched.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def local_folder(model: str | Path) -> Path:
    """The folder itself if it is there, else that of a hub repository (``ByteDance-Seed/BAGEL-7B-MoT``), downloaded
    into the hub's cache where it is not yet.

    Raises:
        FileNotFoundError: if it is neither, or the hub cannot be reached and the cache has it not.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    name = folder.as_posix()
    if not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(f"{model} is not a folder; pass a BAGEL folder, a checkpoint of a run, or owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{model} is no folder here, and no repository the hub gave us: {reason}") from error
