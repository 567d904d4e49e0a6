"""What is inside an archive: names, offsets, sizes, and what was refused. Found once, kept in the cache folder."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from echo4o.data.images import printable

#: No image or text of a data set is larger; a member that claims to be is refused.
MAX_MEMBER_BYTES = 1 << 29
#: A compressed member that grows more than this, beyond the first megabyte, is a decompression bomb.
MAX_RATIO = 200
_FREE_BYTES = 1 << 20
_NUM_EXAMPLES = 3
_OCTAL = frozenset(b"01234567")


@dataclass
class Members:
    """Regular files of an archive, in its order.

    Attributes:
        names: with ``/``, without a leading ``./``; each once.
        offsets, sizes: (N,) int64, of the data in the file. Zip: of the local header, and of the compressed data.
        full_sizes: (N,) int64, once decompressed; equal to `sizes` where nothing is compressed.
        checksums: (N,) int64 CRC-32 of zip members, else empty.
        refused: reason → how many members were left out.
        examples: reason → some of their names.
        broken: how the archive ends where it should not; "" if it is whole.
    """

    names: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    full_sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    checksums: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    refused: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    broken: str = ""

    def problems(self, label: str) -> list[str]:
        """One line for each kind of trouble."""
        lines = []
        if self.broken:
            lines.append(f"{label}: {self.broken}; {len(self.names)} members are usable. Download it again")
        for reason, count in self.refused.items():
            examples = ", ".join(map(printable, self.examples.get(reason, [])))
            verb = (
                "members stand in it twice, the last one counts"
                if reason == "duplicate"
                else f"members refused: {reason}"
            )
            lines.append(f"{label}: {count} {verb} ({examples})")
        return lines

    def save(self, path: Path) -> None:
        """Written aside and renamed, by one process at a time; a failure is no error: the index can be made anew."""
        rest = {"refused": self.refused, "examples": self.examples, "broken": self.broken}
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    names=np.frombuffer("\0".join(self.names).encode("utf-8", "surrogateescape"), np.uint8),
                    offsets=self.offsets,
                    sizes=self.sizes,
                    full_sizes=self.full_sizes,
                    checksums=self.checksums,
                    rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
                )
            os.replace(partial, path)
        except OSError:
            return
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Members | None:
        """A saved index; ``None`` if there is none that can be read."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                rest: dict[str, Any] = json.loads(saved["rest"].tobytes())
                names = saved["names"].tobytes().decode("utf-8", "surrogateescape")
                numbers = {key: saved[key] for key in ("offsets", "sizes", "full_sizes", "checksums")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(names.split("\0") if names else [], **numbers, **rest)


class _Gatherer:
    """Collects members, the last of equal names counting, and counts what is refused."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, int, int, int]] = {}
        self._refused: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, name: str, offset: int, size: int, full_size: int, checksum: int = 0) -> None:
        reason = _name_fault(name)
        if reason:
            return self.refuse(reason, name)
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
        base = name.rpartition("/")[2]
        if not name or base.startswith("._") or name.startswith("__MACOSX/"):
            return None  # what macOS adds
        if max(size, full_size) > MAX_MEMBER_BYTES:
            return self.refuse(f"larger than {MAX_MEMBER_BYTES >> 20} MiB", name)
        if full_size > _FREE_BYTES and full_size > MAX_RATIO * max(size, 1):
            return self.refuse(f"grows more than {MAX_RATIO}-fold", name)
        if name in self._found:
            self.refuse("duplicate", name)
            del self._found[name]
        self._found[name] = (offset, size, full_size, checksum)
        return None

    def refuse(self, reason: str, name: str) -> None:
        self._refused[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(printable(name))

    def members(self, broken: str, *, with_checksums: bool = False) -> Members:
        table = np.array(list(self._found.values()), dtype=np.int64).reshape(len(self._found), 4)
        offsets, sizes, full_sizes, checksums = (np.ascontiguousarray(column) for column in table.T)
        return Members(
            list(self._found),
            offsets,
            sizes,
            full_sizes,
            checksums if with_checksums else np.empty(0, np.int64),
            dict(self._refused),
            self._examples,
            broken,
        )


def _name_fault(name: str) -> str:
    """Why a member of this name is refused; "" if it is not."""
    if name.startswith(("/", "\\")) or name[1:3] in (":/", ":\\"):
        return "absolute name"
    if ".." in name.replace("\\", "/").split("/"):
        return "name leads out of the archive"
    if "\0" in name:
        return "name with a zero byte"
    return ""


def tar_members(path: Path) -> Members:
    """Members of an uncompressed tar, told from its headers. Nothing is read but these."""
    gatherer = _Gatherer()
    size = path.stat().st_size
    broken = ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errorlevel=0) as tar:
                tar.offset = 0
                tar.firstmember = None  # pyright: ignore  (the first, which opening has read already)
                while (member := _plain_member(file, tar) or tar.next()) is not None:
                    tar.members = []  # pyright: ignore  (tarfile would keep every member it has met)
                    if member.isreg() and not member.issparse():
                        if member.offset_data + member.size > size:
                            broken = f"broken off inside {printable(member.name)}"
                            break
                        gatherer.add(member.name, member.offset_data, member.size, member.size)
                    elif not member.isdir():
                        gatherer.refuse("link, device or sparse file", member.name)
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            return gatherer.members(f"broken off or no tar archive ({error})")
        if not broken:
            file.seek(end)
            mark = file.read(512)
            if mark.strip(b"\0"):
                broken = f"damaged at byte {end}"
            elif len(mark) < 512:
                broken = "broken off: it has no end mark"
    return gatherer.members(broken)


def _plain_member(file: BinaryIO, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member if its header is of the simplest kind, as nearly all are; tarfile takes five times as long.

    ``None`` leaves the header to tarfile: long names, extended headers, links, damage, the end.
    """
    start = tar.offset
    file.seek(start)
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(start)  # where tarfile expects to be
    if (
        len(header) < tarfile.BLOCKSIZE
        or header[156:157] not in (b"0", b"\0")
        or header[257:263] != b"ustar\0"
        or header[345]  # the name goes on in the prefix
        or tar.pax_headers
        or not header.isascii()
    ):
        return None
    name, size = header[:100].partition(b"\0")[0].decode(), header[124:136].strip(b" \0")
    checksum = header[148:156].strip(b" \0")
    if not name or name.endswith("/") or not _OCTAL.issuperset(size) or not size or not _OCTAL.issuperset(checksum):
        return None
    if int(checksum or b"0", 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    member = tarfile.TarInfo(name)
    member.size, member.offset, member.offset_data = int(size, 8), start, start + tarfile.BLOCKSIZE
    tar.offset = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return member


def zip_members(path: Path) -> Members:
    """Members of a zip archive, told from its directory at the end; a broken-off one has none."""
    gatherer = _Gatherer()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir():
                    continue
                if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                    gatherer.refuse("link, device or sparse file", entry.filename)
                elif entry.flag_bits & 1:
                    gatherer.refuse("encrypted", entry.filename)
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    gatherer.refuse("unusual compression", entry.filename)
                else:
                    offset = entry.header_offset
                    gatherer.add(entry.filename, offset, entry.compress_size, entry.file_size, entry.CRC)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return gatherer.members(f"broken off or no zip archive ({error})", with_checksums=True)
    return gatherer.members("", with_checksums=True)
