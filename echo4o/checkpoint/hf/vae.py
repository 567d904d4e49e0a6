"""The VAE of an export: ``ae.safetensors`` as it is, or taken out of weights that hold it (lmms-engine's folders)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.progress import byte_progress
from echo4o.checkpoint.hf.writing import write_tensors
from echo4o.checkpoint.shared_file import plan_file
from echo4o.checkpoint.slices import WeightsReader
from echo4o.model.config import VAEConfig
from echo4o.model.vae import WEIGHTS_FILE, infer_config

if TYPE_CHECKING:
    from echo4o.checkpoint.hf.sources import Source

_COPY_BYTES = 1 << 24
#: Before the names of its tensors among a model's.
VAE_INSIDE = "vae_model."


@dataclass(frozen=True)
class VAEFile:
    """Attributes:
    reader: has the VAE's tensors.
    names: name in ``ae.safetensors`` → name in the reader.
    whole_file: the file to copy byte by byte; None where the tensors lie among others.
    """

    reader: WeightsReader
    names: Mapping[str, str]
    whole_file: Path | None

    @classmethod
    def of(cls, source: Source) -> VAEFile:
        """The VAE of a source or its base.

        Raises:
            CheckpointError: if neither has one, or it is damaged.
        """
        path = source.vae_file()
        if path is not None:
            try:
                reader = WeightsReader(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(str(error)) from error
            return cls(reader, {name: name for name in reader.shapes}, path)
        for reader in source.layers.readers:
            names = {name.removeprefix(VAE_INSIDE): name for name in reader.shapes if name.startswith(VAE_INSIDE)}
            if names:
                return cls(reader, names, None)
        raise CheckpointError(
            f"{source.folder} has no VAE ({WEIGHTS_FILE}): pass a BAGEL folder that has it as --base, or copy FLUX's "
            "there"
        )

    @property
    def num_bytes(self) -> int:
        return self.whole_file.stat().st_size if self.whole_file else sum(self.tensor_sizes().values())

    def tensor_sizes(self) -> dict[str, int]:
        """Name → bytes."""
        shapes, dtypes = self.reader.shapes, self.reader.dtypes
        return {name: math.prod(shapes[held]) * dtypes[held].itemsize for name, held in self.names.items()}

    def config(self, stated: VAEConfig | None) -> VAEConfig:
        """What to write of it: `stated`, but of FLUX's, which stands for nothing stated too, what the tensors say.

        Raises:
            CheckpointError: if these are not the tensors of an autoencoder.
        """
        if stated not in (None, VAEConfig()):
            return stated
        try:
            return infer_config({name: self.reader.shapes[held] for name, held in self.names.items()}, "it")
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.reader.path} is no usable autoencoder: {error}") from error

    def write(self, path: Path) -> str:
        """Write the file; returns its SHA-256.

        Raises:
            OSError: if the disk is full.
        """
        if self.whole_file is None:
            return self._write_tensors(path)
        digest = hashlib.sha256()
        with (
            open(self.whole_file, "rb") as source,
            open(path, "wb") as target,
            byte_progress("copying the VAE", self.num_bytes) as advance,
        ):
            while block := source.read(_COPY_BYTES):
                target.write(block)
                digest.update(block)
                advance(len(block))
        return digest.hexdigest()

    def _write_tensors(self, path: Path) -> str:
        shapes, dtypes = self.reader.shapes, self.reader.dtypes
        layout = plan_file({name: (dtypes[held], shapes[held]) for name, held in self.names.items()})
        pieces = (
            (name, iter([self.reader.run(held, 0, math.prod(shapes[held]))])) for name, held in self.names.items()
        )
        with byte_progress("writing the VAE", layout.num_bytes) as advance:
            return write_tensors(path, layout, pieces, advance)
