"""Layers that wait in main memory or on the disk, through accelerate's hooks.

Everything but the layers (embeddings, heads, position tables) always lies on the device that computes, and so does what
`Bagel.device` says.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echo4o.generate.layers import LoadingError, is_quantized, layers_of, num_bytes, without_layers
from echo4o.model import Bagel

PLACES = ("cpu", "disk", "auto")
#: Left free of weights on a GPU by ``auto``: keys and values, activations, and the autoencoder at 1024 × 1024.
WORKING_BYTES = 4 << 30
_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}

#: By device (its number, or ``cpu``): bytes, or text such as "20GiB".
MaxMemory = Mapping[Any, int | str]


def check_place(where: str | None, quantized: bool = False) -> None:
    """Refuse before any long work.

    Raises:
        LoadingError: for an unknown place, quantised layers on the disk, or if accelerate is not installed.
    """
    if where not in (None, *PLACES):
        raise LoadingError(f"offload is {where!r}; choose one of {', '.join(PLACES)}")
    if where is not None and importlib.util.find_spec("accelerate") is None:
        raise LoadingError("offload needs accelerate: pip install 'echo4o[offload]'")
    if where == "disk" and quantized:
        raise LoadingError(
            "quantised layers cannot lie on the disk: use offload cpu with quantize, or offload disk without it"
        )


def offload(
    model: Bagel,
    where: str,
    device: torch.device | str,
    max_memory: MaxMemory | None = None,
    folder: str | Path | None = None,
) -> None:
    """Let layers wait elsewhere; each of their weights comes to `device` for the moment it is used there.

    A model so treated stays as it is: it cannot be moved, trained or compiled. `load` does the same without ever having
    the whole model in memory.

    Args:
        where: ``cpu`` or ``disk``: all layers; ``auto``: as many layers as fit stay on the device, as many of the
            others as fit in main memory, the rest on the disk.
        device: which computes.
        max_memory: for ``auto``: bytes of weights, or text such as ``"20GiB"``, of the device (by its number) and of
            main memory (``"cpu"``). Default: what is free now, less 4 GiB on a GPU and a tenth of main memory.
        folder: for layers on the disk; keeps its files. By default a temporary folder that goes with the model; where
            such folders lie in main memory, as they do on some systems, pass one on a disk.

    Raises:
        LoadingError: for an unknown place, a device or size in `max_memory` that makes no sense, quantised layers on
            the disk, or if accelerate is not installed.
    """
    check_place(where)
    device = torch.device(device)
    with without_layers(model):
        model.to(device)
        room = Room(where, device, max_memory, reserved=num_bytes(model))
    layers = layers_of(model)
    room.keep_for_transit(layers.values())
    disk = Disk(model, folder)
    for name, layer in layers.items():
        place = room.place(num_bytes(layer))
        check_place(place if place != "device" else None, quantized=is_quantized(layer))
        on_disk = disk.written(name, layer.state_dict().items()) if place == "disk" else None
        settle(layer, name, place, device, on_disk)


def settle(layer: nn.Module, name: str, place: str, device: torch.device, on_disk: Mapping[str, Tensor] | None) -> None:
    """Leave a layer at its place, with hooks that bring its weights to the device while they are used."""
    if place == "device":
        layer.to(device)
        return
    from accelerate.hooks import attach_align_device_hook

    if on_disk is None:
        layer.to("cpu")
        on_disk = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    attach_align_device_hook(layer, execution_device=device, offload=True, weights_map=on_disk, module_name=name)


class Room:
    """Where layers lie, one after another: on the device while it has room, then in main memory, then on the disk.

    Accelerate's own device maps follow the order of modules, so that the last one, the output head, would be away.
    """

    def __init__(self, where: str | None, device: torch.device, max_memory: MaxMemory | None, reserved: int) -> None:
        self.free: dict[str, float] = {"device": math.inf}
        if where in ("cpu", "disk"):
            self.free = {where: math.inf}
        elif where == "auto":
            self.free = {**_budgets(device, max_memory), "disk": math.inf}
            self.free["device"] -= reserved

    def keep_for_transit(self, layers: Iterable[nn.Module]) -> None:
        """Unless all layers fit, the device must also hold the one that is computed."""
        sizes = [num_bytes(layer) for layer in layers]
        if "device" in self.free and self.free["device"] < sum(sizes):
            self.free["device"] -= max(sizes)

    def place(self, size: int) -> str:
        place = next(place for place, free in self.free.items() if size <= free)
        self.free[place] -= size
        return place


def _budgets(device: torch.device, max_memory: MaxMemory | None) -> dict[str, float]:
    """Bytes of weights for ``device`` and, if that is another one, for ``cpu``."""
    import psutil  # comes with accelerate

    main = 0.9 * psutil.virtual_memory().available
    on_cpu = device.type == "cpu"
    own = "cpu" if on_cpu else device.index or 0
    given = {int(key) if str(key).isdecimal() else key: _bytes(size) for key, size in (max_memory or {}).items()}
    if unknown := [key for key in given if key not in (own, "cpu")]:
        raise LoadingError(
            f"max_memory names {unknown[0]!r}, but this model computes on {device} alone: name "
            f"{'cpu' if on_cpu else f'{own} and cpu'}; to use several GPUs, let each draw its share of the requests"
        )
    if on_cpu:
        return {"device": given.get("cpu", main)}
    free = given[own] if own in given else torch.get_device_module(device).mem_get_info(device)[0] - WORKING_BYTES
    return {"device": free, "cpu": given.get("cpu", main)}


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number = size.strip().rstrip("bBiIkKmMgGtT")
    unit = size.strip()[len(number) :].lower()
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise LoadingError(f"max_memory has {size!r}; write bytes, or text such as '20GiB' or '500MB'") from None


class Disk:
    """Layers as files of a folder, which is made when the first one is written."""

    def __init__(self, model: Bagel, folder: str | Path | None) -> None:
        self._model, self._folder = model, None if folder is None else Path(folder)

    def written(self, name: str, tensors: Iterable[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
        """Write the tensors of the layer `name`, one at a time; they are read when they are looked up."""
        from accelerate.utils import OffloadedWeightsLoader, offload_weight

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="echo4o-offload-"))
            weakref.finalize(self._model, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {}
        for key, tensor in tensors:
            offload_weight(tensor.detach(), f"{name}.{key}", str(self._folder), index)
        return OffloadedWeightsLoader(save_folder=str(self._folder), index=index)
