"""LoRA adapters (Hu et al., 2021) through peft: where they sit, and how they start.

``X.lora_A`` (rank, in) and ``X.lora_B`` (out, rank) beside a frozen linear layer X: its output gains
``alpha / rank · B A dropout(x)``. They are float32 and start as B = 0, so that a new run starts from its base exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from echo4o.checkpoint.names import is_adapter, public_name
from echo4o.checkpoint.pieces import Piece
from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.train.selection import SETS, cut_by_freeze_und, nothing_matches, selector

#: Sets of layers that can be adapted; the word embeddings and lm_head are not.
TARGET_SETS = tuple(name for name in SETS if name != "embeddings")


def add_lora(
    model: Bagel, *, rank: int, alpha: float = 0.0, dropout: float = 0.0, targets: Sequence[str] = ("gen",)
) -> list[str]:
    """Put an adapter beside every linear layer that `targets` name and freeze everything else.

    On the meta device the adapters are there too (`init_adapters` fills their pieces); elsewhere peft initialises them.
    Dropout draws from the global generator of the device: checkpoints hold its state for each rank, and recomputation
    of activations must restore it (`apply_activation_checkpointing`'s ``draws_random_numbers``).

    Args:
        alpha: updates are scaled by alpha / rank; 0 is twice the rank.
        targets: names of `TARGET_SETS`, or patterns searched in names of linear layers.

    Returns:
        The names of the adapted layers.

    Raises:
        ConfigError: if peft is missing, or a target matches no layer or none that gets a gradient.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"lora_rank needs peft ({error}): pip install 'echo4o[lora]'") from error

    layers = target_layers(model, targets)
    _refuse_cut(model, layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=scaled_alpha(rank, alpha),  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=layers,
        bias="none",
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=model.device.type == "meta")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()  # peft gives them the dtype of their layer
    return layers


def scaled_alpha(rank: int, alpha: float) -> float:
    """``lora_alpha`` as it counts: twice the rank where it is 0."""
    return alpha or 2.0 * rank


def target_layers(model: Bagel, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that sets or patterns mean, in the model's order.

    Raises:
        ConfigError: if one of them means none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for target in targets:
        if target in SETS and target not in TARGET_SETS:
            raise ConfigError(f"lora_targets: {target} cannot be adapted; choose from {', '.join(TARGET_SETS)}")
        matches = selector(target)
        # Sets are told apart by names of parameters.
        found = [name for name in linear if matches(f"{name}.weight" if target in SETS else name)]
        if not found and target == "gen":
            raise ConfigError(
                f"lora_targets: {model.config.llm.layer_module} has no generation experts for gen; use und, or "
                "patterns of layer names"
            )
        if not found:
            raise ConfigError(nothing_matches("lora_targets", target, linear))
        chosen.update(found)
    if "language_model.lm_head" in chosen:
        raise ConfigError("lora_targets: lm_head cannot be adapted; --train_only lm_head trains it as a whole")
    return [name for name in linear if name in chosen]


def _refuse_cut(model: Bagel, layers: Sequence[str]) -> None:
    cut = cut_by_freeze_und(model)
    if unreached := [name for name in layers if f"{name}.weight" in cut]:
        raise ConfigError(
            f"lora_targets adapts {len(unreached)} layers that get no gradient with freeze_und True, e.g. "
            f"{unreached[0]}. Set freeze_und False, or adapt gen only."
        )


@torch.no_grad()
def init_adapters(pieces: Mapping[str, Piece], seed: int) -> None:
    """Fill adapters as peft does: A uniform in ± 1 / sqrt(in), B zero.

    Each A is drawn whole on the CPU from a generator of its own, seeded by `seed` and its name, and a process takes its
    run: the number of ranks, the engine and the device change nothing.

    Args:
        pieces: by public name, ``….lora_A.weight`` or ``….lora_B.weight``.
    """
    for name, piece in pieces.items():
        if ".lora_A." not in name:
            piece.values.zero_()
            continue
        digest = hashlib.sha256(f"{seed}:{public_name(name)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(piece.shape)
        bound = 1 / math.sqrt(piece.shape[1])  # kaiming_uniform(a = sqrt 5)
        values.uniform_(-bound, bound, generator=generator)
        piece.values.copy_(values.reshape(-1)[piece.start : piece.stop])
