"""What the stand-in of the hub keeps: repositories, their branches and files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")


@dataclass
class Blob:
    """A file: in LFS, or in git."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As git names it; of an LFS file, its pointer's stand-in."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def described(self) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "oid": self.oid, "size": len(self.data), **lfs}


@dataclass
class Repository:
    """Attributes:
    commits: commit → path → file.
    branches: name → commit.
    messages: of the commits that were sent, oldest first.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        text = repr((len(self.commits), sorted((path, blob.oid) for path, blob in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.branches.get(revision, revision))


def upload_mode(file: dict[str, Any], existing: dict[str, Blob]) -> dict[str, Any]:
    lfs, known = file["path"].endswith(LFS_SUFFIXES), existing.get(file["path"])
    oid = {"oid": known.sha256 if known.lfs else known.oid} if known else {}
    return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid}
