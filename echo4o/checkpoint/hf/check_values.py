"""Every number of a folder's weights: finite, not all zero where that means nothing, tables as their formula has them.

Files are read once, front to back, into one small buffer; the same pass gives their SHA-256.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo4o.checkpoint.hf.findings import Examination, counted, some
from echo4o.checkpoint.hf.progress import byte_progress
from echo4o.model import Bagel
from echo4o.model.headers import Header, Stored
from echo4o.model.pretrained import upstream_name
from echo4o.model.vae import WEIGHTS_FILE

#: Read at once: fits a processor's cache.
_CHUNK_BYTES = 1 << 21
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Difference up to which a table counts as the formula's, in another precision: that of bfloat16.
_TABLE_TOLERANCE = 2.0**-7
Advance = Callable[[int], None]


@dataclass
class _Seen:
    """What the values of a file show."""

    non_finite: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    other_tables: dict[str, float] = field(default_factory=dict)


def check_values(
    examination: Examination,
    headers: Mapping[str, Header],
    model: Bagel | None,
    listed: Mapping[str, Mapping[str, Any]],
) -> None:
    """Read every file.

    Args:
        headers: file → header, of the files with tensors to check.
        model: whose fixed tables the files may hold; on the meta device.
        listed: file → its ``sha256``, as an export lists them; other files than those of `headers` are hashed alone.
    """
    digests = {
        name: str(entry["sha256"])
        for name, entry in listed.items()
        if entry.get("sha256") and name not in examination.unusable
    }
    tables = _Tables(model)
    rest = [name for name in digests if name not in headers]
    sizes = [header.num_bytes for header in headers.values()]
    sizes += [(examination.folder / name).stat().st_size for name in rest]
    with byte_progress("checking values", sum(sizes)) as advance:
        for name, header in headers.items():
            seen, digest = _Seen(), hashlib.sha256() if name in digests else None
            try:
                _read(header, tables, seen, digest, advance)
            except OSError as error:
                examination.unusable_file(name, f"cannot be read to its end ({error})", "copy or download it again")
                continue
            _say(examination, name, seen)
            _compare(examination, name, digest, digests)
        for name in rest:
            _compare(examination, name, _hash(examination.folder / name, advance), digests)


def _compare(examination: Examination, name: str, digest: Any, digests: Mapping[str, str]) -> None:
    if digest is not None and digest.hexdigest() != digests[name]:
        examination.doubt(
            name,
            "has other content than when it was exported (SHA-256 differs)",
            "export or download it again; after a change on purpose, take its entry out of echo4o_export.json",
        )


def _hash(path: Path, advance: Advance) -> Any:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest


# ---------------------------------------------------------------- one file


def _read(header: Header, tables: _Tables, seen: _Seen, digest: Any, advance: Advance) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with open(header.path, "rb", buffering=0) as file:
        _fill(file, buffer, header.data_begins, digest, advance)
        for name, stored in header.tensors.items():
            _read_tensor(file, buffer, upstream_name(name), stored, tables, seen, digest, advance)


def _fill(file: Any, buffer: bytearray, num_bytes: int, digest: Any, advance: Advance, each: Any = None) -> None:
    """Read the next bytes, a buffer full at a time; `each` gets how many there are in it."""
    while num_bytes:
        wanted = memoryview(buffer)[: min(num_bytes, len(buffer))]
        done = 0
        while done < len(wanted):
            count = file.readinto(wanted[done:])
            if not count:
                raise OSError("it has become shorter while it was read")
            done += count
        if digest is not None:
            digest.update(wanted)
        advance(done)
        num_bytes -= done
        if each is not None:
            each(done)


def _read_tensor(
    file: Any, buffer: bytearray, name: str, stored: Stored, tables: _Tables, seen: _Seen, digest: Any, advance: Advance
) -> None:
    dtype = _FLOATS.get(stored.dtype)
    table = tables.get(name, stored.shape) if dtype is not None else None
    bad, is_zero, deviation, place = 0, True, 0.0, 0

    def look(num_bytes: int) -> None:
        nonlocal bad, is_zero, deviation, place
        if dtype is None:
            return
        values = torch.frombuffer(buffer, dtype=dtype, count=num_bytes // dtype.itemsize)
        low, high = (float(limit) for limit in torch.aminmax(values))  # a NaN among the values becomes both
        if not (math.isfinite(low) and math.isfinite(high)):
            bad += int((~torch.isfinite(values)).sum())
        is_zero = is_zero and low == 0 == high
        if table is not None:
            difference = values.double() - table[place : place + len(values)]
            deviation = max(deviation, float(difference.abs().max()))
        place += len(values)

    _fill(file, buffer, stored.end - stored.begin, digest, advance, look)
    if bad:
        seen.non_finite[name] = bad
    elif table is not None and deviation > _TABLE_TOLERANCE:
        seen.other_tables[name] = deviation
    elif is_zero and dtype is not None and place:
        seen.zero.append(name)


class _Tables:
    """The fixed tables of a model as their formulas have them, computed when asked for; one at a time is kept."""

    def __init__(self, model: Bagel | None) -> None:
        self._model = model
        self._names = set(model.table_names()) if model else set()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """(n,) in float32; None if `name` is no table of this shape."""
        if self._model is None or name not in self._names:
            return None
        owner, _, leaf = name.rpartition(".")
        module = copy.deepcopy(self._model.get_submodule(owner)).to_empty(device="cpu")
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
        table = getattr(module, leaf).detach()
        return table.flatten() if table.shape == shape else None


# ---------------------------------------------------------------- in words


def _say(examination: Examination, file: str, seen: _Seen) -> None:
    again = "download or export it again; from a run, take an earlier checkpoint"
    if seen.non_finite:
        names = [f"{name} ({count:,})" for name, count in seen.non_finite.items()]
        examination.error(
            file, f"holds numbers that are not finite in {counted(len(names), 'tensor')}: {some(names)}", again
        )
    if seen.other_tables:
        names = [f"{name} (by {by:.2g})" for name, by in seen.other_tables.items()]
        examination.error(
            file,
            f"holds position tables that are not those of the sin-cos formula: {some(names)}",
            "remove the tensors (they are computed then), or export again; upstream's scripts never read them",
        )
    _say_zero(examination, file, seen.zero)


def _say_zero(examination: Examination, file: str, zero: list[str]) -> None:
    if file == WEIGHTS_FILE:
        zero = [name for name in zero if name.endswith("conv.weight")]
    velocity = [name for name in zero if name.startswith("llm2vae.")]
    if "llm2vae.weight" in velocity:
        examination.warning(
            file,
            "llm2vae.weight is all zero, as in a new model: it has never been trained to draw",
            "train it, or take weights that were",
        )
    adapters = [name for name in zero if ".lora_B." in name]
    if adapters:
        examination.warning(
            file,
            f"{counted(len(adapters), 'adapter')} change nothing, all zero: {some(adapters)}",
            "train them, or take the base itself",
        )
    others = [n for n in zero if n.endswith("weight") and n not in velocity and n not in adapters]
    if others:
        examination.warning(
            file,
            f"{counted(len(others), 'tensor')} are all zero: {some(others)}",
            "a part that was never filled computes nothing: fill it from the base, or download it again",
        )
