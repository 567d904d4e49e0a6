"""Find and read a model's safetensors, single-file or sharded, tensor by tensor, under upstream's names."""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from echo4o.model.headers import Stored, read_header

WEIGHTS = ("ema", "model")

#: The one table of foreign names: what to cut out of a name to have upstream's.
_FOREIGN_NAMES = (
    # torch's wrappers (DDP, compile, FSDP1, activation checkpointing)
    re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."),
    # a container around the whole model (NeMo Automodel's own checkpoints, vllm-omni)
    re.compile(
        r"^(?:model|bagel)\.(?=(?:language_model|vit_model|connector|vit_pos_embed|latent_pos_embed|time_embedder|"
        r"vae2llm|llm2vae|vae_model)\.)"
    ),
)
#: The VAE's tensors where they lie among a model's: in the published index, and in lmms-engine's folders.
VAE_PREFIXES = ("encoder.", "decoder.", "vae_model.")

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def upstream_name(name: str) -> str:
    """A tensor's name in upstream's files, from that in another program's."""
    for pattern in _FOREIGN_NAMES:
        name = pattern.sub("", name)
    return name


def names_in(held: Iterable[str]) -> dict[str, str]:
    """Upstream's name → name in a file."""
    return {upstream_name(name): name for name in held}


def find_weights(folder: str | Path, weights: str | None = None) -> Path | None:
    """The weights file (or shard index) of a folder, or None.

    Args:
        weights: ``ema`` or ``model``; None takes the first that exists, ``ema`` before ``model``.

    Raises:
        ValueError: for another name.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)} or None, not {weights!r}")
    for name in [weights] if weights else WEIGHTS:
        for suffix in (".safetensors", ".safetensors.index.json"):
            if (path := Path(folder) / f"{name}{suffix}").exists():
                return path
    return None


def shard_files(path: Path) -> list[Path]:
    """The safetensors files behind `path`: itself, or those its index names.

    Raises:
        FileNotFoundError: naming the shards that are missing.
    """
    if path.suffix != ".json":
        return [path]
    index = json.loads(path.read_text(encoding="utf-8"))
    files = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{path} names shards that are not there: {', '.join(missing)}; download them again")
    return files


class TensorFile:
    """A safetensors file whose tensors are read, not mapped: Linux counts torch's private, writable map as memory that
    may be needed, and refuses it for a file that is larger than the machine's.

    Args:
        path: is kept open, so that it can be read though it is removed meanwhile.

    Attributes:
        tensors: name in the file → dtype, shape and place.

    Raises:
        ValueError: if it is damaged, or holds tensors that torch has no dtype for.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.tensors: Mapping[str, Stored] = read_header(path).tensors
        except ValueError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file (it {error}); download or copy it again"
            ) from error
        for name, stored in self.tensors.items():
            if stored.dtype not in _DTYPES:
                raise ValueError(f"{path} holds {name} as {stored.dtype}, a dtype that torch does not have; convert it")
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.tensors[name].dtype]

    def run(self, name: str, start: int, stop: int) -> Tensor:
        """(stop − start,) elements of a tensor in row-major order.

        Raises:
            OSError: if the file has become shorter, or the disk fails.
        """
        values = torch.empty(stop - start, dtype=self.dtype(name))
        offset = self.tensors[name].begin + start * values.element_size()
        buffer = memoryview(values.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        while buffer:
            done = os.preadv(self._descriptor, [buffer], offset)
            if not done:
                raise OSError(f"{self.path} has become shorter while it was read; copy or download it again")
            offset, buffer = offset + done, buffer[done:]
        return values

    def tensor(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        return self.run(name, 0, math.prod(shape)).reshape(shape)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, from the headers alone."""
    files = [TensorFile(file) for file in shard_files(path)]
    return {upstream_name(name): stored.shape for file in files for name, stored in file.tensors.items()}


def iter_tensors(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor (or those of `names`), one at a time: memory is that of the largest."""
    wanted = None if names is None else set(names)
    for file in map(TensorFile, shard_files(path)):
        for name, held in names_in(file.tensors).items():
            if wanted is None or name in wanted:
                yield name, file.tensor(held)


def check_state(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], source: str, optional: Sequence[str] = ()
) -> list[str]:
    """Compare names and shapes; the unexpected names are returned for the banner.

    Raises:
        ValueError: if a tensor is missing or has another shape, with a remedy.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, e.g. {', '.join(missing[:3])}. "
            "It is incomplete or of another architecture: check layer_module, llm_qk_norm, visual_gen and visual_und, "
            "or fill a partial checkpoint from its base model."
        )
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source} holds {name} as {tuple(found[name])}, the config asks for {tuple(expected[name])}"
            f" ({len(wrong)} such tensors); use the config that belongs to these weights."
        )
    return [name for name in found if name not in expected and not name.startswith(VAE_PREFIXES)]


@torch.no_grad()
def load_weights(
    model: nn.Module, path: Path, optional: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> list[str]:
    """Copy the tensors at `path` into `model` (any dtype to any dtype), one at a time.

    Args:
        optional: tensors that the file may lack.
        aliases: name → name to read when the first is absent (tied embeddings).

    Returns:
        The names in the file that the model does not have.

    Raises:
        ValueError: if tensors are missing or have another shape.
    """
    targets = dict(model.state_dict(keep_vars=True))
    found = read_shapes(path)
    absent = {name: other for name, other in (aliases or {}).items() if name not in found and other in found}
    unexpected = check_state({n: t.shape for n, t in targets.items() if n not in absent}, found, str(path), optional)
    for name, tensor in iter_tensors(path, list(targets)):
        if name in targets:
            targets[name].copy_(tensor)
        for alias in [alias for alias, other in absent.items() if other == name]:
            targets[alias].copy_(tensor)
    return unexpected
