"""What an exported folder says of itself: ``echo4o_export.json``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.weights import write_text

EXPORT_FILE = "echo4o_export.json"
FORMAT = 1
_SHOWN_PARTS = 3


@dataclass(frozen=True)
class Provenance:
    """Where an export comes from, and what its files are.

    Attributes:
        source: the checkpoint, without the folders of one machine (`shown_path`).
        weights: ``ema`` or ``model``.
        layout: ``bagel``, ``hf``, ``both`` or ``adapter``.
        dtype: of the weights.
        step: optimiser steps of a training checkpoint; None for other folders.
        base: what filled missing parts or belongs to adapters (hub name or `shown_path`); None if nothing did.
        origins: file, or ``formula`` → number of tensors taken from there.
        files: name → size in bytes and SHA-256, of every file but this one and the card.
        version, commit: of this project; commit None where it is not a checkout.
    """

    source: str
    weights: str
    layout: str
    dtype: str
    step: int | None = None
    base: str | None = None
    origins: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    version: str = ""
    commit: str | None = None


def write_provenance(folder: str | Path, provenance: Provenance) -> None:
    write_text(Path(folder) / EXPORT_FILE, json.dumps({"format": FORMAT, **asdict(provenance)}, indent=2) + "\n")


def read_provenance(folder: str | Path) -> Provenance | None:
    """None for a folder that was not exported by this project.

    Raises:
        CheckpointError: if the file is damaged or of a later version.
    """
    path = Path(folder) / EXPORT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}: update echo4o")
        return Provenance(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); export or download the folder again") from error


def shown_path(path: str | Path) -> str:
    """A path for people elsewhere: relative as it was given, else its last parts, without anybody's home folder."""
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    parts = path.parts[1:]
    if parts[:1] == ("root",):
        parts = parts[1:]
    elif parts[:1] in (("home",), ("Users",)):
        parts = parts[2:]
    return "/".join(parts[-_SHOWN_PARTS:])


def project_version() -> str:
    try:
        return version("echo4o")
    except PackageNotFoundError:
        return "unknown"


def project_commit() -> str | None:
    """The commit of the checkout that this code runs from, with ``+changes`` if its files differ from it."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
