"""Which tensor of a run lies in which file of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter, public_name
from echo4o.checkpoint.pieces import Piece

if TYPE_CHECKING:
    from echo4o.train.engine import Engine

TRAINING = "training.json"
OPTIMIZER = "optimizer.safetensors"
FROZEN = "frozen.safetensors"
#: Files with what trains, by kind of weights: all of it, beside frozen parts, and LoRA's.
WHOLE = {"model": "model.safetensors", "ema": "ema.safetensors"}
TRAINED = {"model": "model.trained.safetensors", "ema": "ema.trained.safetensors"}
ADAPTER = {"model": "adapter_model.safetensors", "ema": "adapter_ema.safetensors"}


@dataclass
class Inventory:
    """Which tensor goes into which file.

    Attributes:
        tables: fixed tables, written with what trains: small, and part of every BAGEL checkpoint.
        tied: further name → name of parameters that bear two.
        layered: parts of the model are frozen and lie in a file of their own.
        adapted: LoRA; the frozen base is named, not written.
    """

    tables: set[str]
    tied: dict[str, str]
    layered: bool
    adapted: bool

    @classmethod
    def of(cls, engine: Engine) -> Inventory:
        names = getattr(engine.module, "table_names", list)()
        frozen = set(engine.frozen()) - set(names)
        adapted = any(is_adapter(name) for name in engine.trained())
        tied = {public_name(name): public_name(first) for name, first in tied_names(engine.module).items()}
        return cls(set(names), tied, bool(frozen) and not adapted, adapted)

    def files(
        self, pieces: Mapping[str, Mapping[str, Piece]], frozen: Mapping[str, Piece]
    ) -> dict[str, dict[str, Piece]]:
        """File → name in the file → piece."""
        result: dict[str, dict[str, Piece]] = {OPTIMIZER: dict(pieces["optimizer"])}
        fixed = {} if self.adapted else {name: piece for name, piece in frozen.items() if name in self.tables}
        for kind in ("model", "ema"):
            weights = {name: piece for name, piece in pieces[kind].items() if not is_adapter(name)}
            adapters = {ADAPTER_PREFIX + name: piece for name, piece in pieces[kind].items() if is_adapter(name)}
            if adapters:
                result[ADAPTER[kind]] = adapters
            if weights or not adapters:
                separate = self.layered or self.adapted
                result[(TRAINED if separate else WHOLE)[kind]] = self._with_tied(weights | fixed)
        if self.layered:
            rest = {name: piece for name, piece in frozen.items() if name not in self.tables}
            result[FROZEN] = self._with_tied(rest)
        return result

    def _with_tied(self, content: dict[str, Piece]) -> dict[str, Piece]:
        twins = {name: content[first] for name, first in self.tied.items() if first in content}
        return content | twins

    def indexes(self, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Where weights lie in two files: ``model.safetensors.index.json`` and EMA's make them one model."""
        if not self.layered:
            return {}
        texts = {}
        for kind in ("model", "ema"):
            weight_map = {name: file for file in (FROZEN, TRAINED[kind]) for name in tensors[file]}
            entries = [entry for file in (FROZEN, TRAINED[kind]) for entry in tensors[file].values()]
            size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in entries)
            content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            texts[f"{WHOLE[kind]}.index.json"] = json.dumps(content, indent=2) + "\n"
        return texts


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further name → first name of parameters that bear several."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
