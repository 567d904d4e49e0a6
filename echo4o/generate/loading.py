"""Models that are larger than the GPU, or than main memory: read layer by layer, in fewer bits, or left elsewhere.

model = load("hf/BAGEL-7B-MoT", "bfloat16", "cuda", quantize="int8")
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from echo4o.checkpoint.adapters import MergedWeights, is_adapter_folder
from echo4o.checkpoint.pieces import whole
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.generate.layers import LoadingError, layers_of, num_bytes, without_layers
from echo4o.generate.offloading import Disk, MaxMemory, Room, check_place, offload, settle
from echo4o.generate.quantization import check_kind, quantize, quantize_layer
from echo4o.model import Bagel, BagelConfig
from echo4o.model.pretrained import TensorFile, check_state, find_weights, names_in, read_shapes, shard_files

__all__ = ["LoadingError", "load", "offload", "quantize"]

logger = logging.getLogger(__name__)


def load(
    folder: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    weights: str | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    offload: str | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
) -> Bagel:
    """A BAGEL folder or checkpoint, layer by layer: no memory ever holds more than what stays there and one layer.

    Layers on the disk are read from the weights file itself whenever they are computed; only where adapters have to be
    merged into them are they written anew, into `offload_folder`.

    Args:
        weights, base: as in `load_bagel`.
        quantize: None, or as in `quantize`.
        offload, max_memory, offload_folder: None, or as in `offload`.

    Raises:
        FileNotFoundError, ValueError: as `load_bagel`.
        LoadingError: as `quantize` and `offload`.
    """
    check_kind(quantize)
    check_place(offload, quantized=quantize is not None)
    if quantize == "nf4" and offload is not None:
        raise LoadingError("nf4 weights cannot move between devices: use offload with int8, or nf4 without offload")
    device = torch.device(device)
    source = _source(Path(folder), weights, base)
    model = source.model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    with without_layers(model):
        model.to_empty(device=device)
        model.language_model.tie_weights()  # to_empty gives every name a storage of its own
        model.reset_tables()
        _fill(model, source)
        room = Room(offload, device, max_memory, reserved=num_bytes(model))
    layers = layers_of(model)
    room.keep_for_transit(layers.values())
    disk = Disk(model, offload_folder)
    console = Console(stderr=True)
    for name, layer in track(
        layers.items(), "reading layers", len(layers), console=console, transient=True, disable=not console.is_terminal
    ):
        place = "device" if quantize else room.place(num_bytes(layer))
        if place != "disk":
            layer.to_empty(device="cpu" if place == "cpu" else device)
            _fill(layer, source, f"{name}.")
        if quantize:
            quantize_layer(layer, quantize)
            place = room.place(num_bytes(layer))
            check_place(place if place != "device" else None, quantized=True)
        settle(layer, name, place, device, source.on_disk(layer, name, disk) if place == "disk" else None)
    return model


# ---------------------------------------------------------------- where weights come from


@dataclass
class _Folder:
    """A folder's weights file: the model on the meta device, and its tensors by name."""

    model: Bagel
    path: Path

    def __post_init__(self) -> None:
        head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        aliases = {head: embedding, embedding: head} if self.model.config.llm.tie_word_embeddings else {}
        self._reader = LayeredReader([WeightsReader(self.path)], aliases)
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict(keep_vars=True).items()}
        self.absent = [name for name in shapes if self._reader.find(name) is None]
        tied = [name for name in aliases if self._reader.find(name) is not None]
        expected = {name: shape for name, shape in shapes.items() if name not in tied or name in self._reader.shapes()}
        unused = check_state(expected, read_shapes(self.path), str(self.path), self.model.table_names())
        if unused:
            logger.warning("%s has %d tensors this config does not use, e.g. %s", self.path, len(unused), unused[0])

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        found = self._reader.find(name)
        assert found is not None
        reader, known = found
        tensor = torch.empty(reader.shapes[known], dtype=dtype)
        reader.fill(known, whole(tensor))
        return tensor

    def on_disk(self, layer: nn.Module, name: str, disk: Disk) -> Mapping[str, Tensor]:
        """The layer's tensors where they are already; hooks turn them into the layer's dtype."""
        from accelerate.utils import OffloadedWeightsLoader

        index = {}
        for file in shard_files(self.path):
            held = names_in(TensorFile(file).tensors)
            names = [f"{name}.{key}" for key in layer.state_dict() if f"{name}.{key}" in held]
            index |= {key: {"safetensors_file": str(file), "weight_name": held[key]} for key in names}
        return OffloadedWeightsLoader(index=index)


@dataclass
class _Adapted:
    """Weights with adapters, merged as they are read."""

    merged: MergedWeights

    def __post_init__(self) -> None:
        self.model, self.absent, self.tensor = self.merged.model, self.merged.absent, self.merged.tensor

    def on_disk(self, layer: nn.Module, name: str, disk: Disk) -> Mapping[str, Tensor]:
        state = layer.state_dict()
        return disk.written(name, ((key, self.tensor(f"{name}.{key}", state[key].dtype)) for key in state))


def _source(folder: Path, weights: str | None, base: str | Path | None) -> _Folder | _Adapted:
    if is_adapter_folder(folder):
        return _Adapted(MergedWeights(folder, weights, base))
    path = find_weights(folder, weights)
    if path is None:
        wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
        raise FileNotFoundError(f"{folder} has no {wanted} (nor a sharded index of it)")
    with torch.device("meta"):
        return _Folder(Bagel(BagelConfig.from_pretrained(folder)), path)


@torch.no_grad()
def _fill(module: nn.Module, source: _Folder | _Adapted, prefix: str = "") -> None:
    for key, target in module.state_dict(keep_vars=True).items():
        if (name := prefix + key) not in source.absent:
            target.copy_(source.tensor(name, target.dtype))
