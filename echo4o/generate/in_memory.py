"""From a model that transformers holds in memory to this project's own, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo4o.checkpoint.hub import local_folder
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model import Bagel, BagelConfig
from echo4o.model.pretrained import check_state


def pipeline(
    state: Mapping[str, Tensor], values: Mapping[str, Any], folder: str | Path, device: torch.device | str | None = None
) -> Echo4oPipeline:
    """A pipeline whose model has the tensors of `state` as its own parameters.

    Exported folders call this: its name and its arguments stay as they are.

    Args:
        values: content of the model's ``config.json``.
        folder: with tokenizer and autoencoder, or a repository of the hub.
        device: of the autoencoder; the model's by default.

    Raises:
        ValueError: if `state` is not that of such a model in one memory.
        FileNotFoundError: if there is no such folder.
    """
    return Echo4oPipeline.around(shared_bagel(state, values), local_folder(folder), device)


def shared_bagel(state: Mapping[str, Tensor], values: Mapping[str, Any]) -> Bagel:
    """A model with the tensors of `state` (``state_dict(keep_vars=True)``) as its own.

    Raises:
        ValueError: as `pipeline`.
    """
    if adapted := [name for name in state if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(f"the model has adapters ({adapted[0]}): merge them first, with peft's merge_and_unload()")
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(
            f"{away[0]} is not in memory (device_map left it elsewhere): load the model on one device, or use "
            "Echo4oPipeline.from_pretrained(FOLDER, offload=...)"
        )
    with torch.device("meta"):
        model = Bagel(BagelConfig.from_values(values, freeze_und=False))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    check_state({name: tensor.shape for name, tensor in model.state_dict().items()}, shapes, "the model in memory")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(state[name].requires_grad)  # assigning gives this flag to the tensor
    model.load_state_dict(dict(state), assign=True)
    model.set_attention_kernel("auto")
    return model
