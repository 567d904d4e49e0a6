"""What trains: frozen parts, what ``freeze_und`` cuts off, and named sets or patterns of parameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from echo4o.checkpoint.names import is_adapter, public_name
from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.model.parts import part_of

POSITION_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
#: Sets that settings may name → the part of the model (`part_of`).
SETS = {
    "gen": "generation experts",
    "und": "understanding experts",
    "vit": "vit",
    "connector": "connector",
    "heads": "latent heads",
    "embeddings": "word embeddings",
}


def selector(pattern: str) -> Callable[[str], bool]:
    """Whether a name belongs to the set called `pattern`, or else, whether the regular expression occurs in it."""
    if pattern in SETS:
        part = SETS[pattern]
        return lambda name: part_of(name) == part
    found = re.compile(pattern)
    return lambda name: found.search(name) is not None


def nothing_matches(setting: str, pattern: str, names: Iterable[str]) -> str:
    """The message for a pattern without a match: the sets, or the name that it comes nearest to."""
    near = difflib.get_close_matches(pattern, SETS, n=1, cutoff=0.5) or nearest(pattern, names)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{setting}: nothing is called {pattern!r}.{hint} Give {', '.join(SETS)}, or patterns of names."


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The one name, or dotted end of a name, most like `pattern`; empty if none is."""
    ends = {".".join(words[i:]) for name in names if (words := name.split(".")) for i in range(len(words))}
    return difflib.get_close_matches(pattern, sorted(ends), n=1, cutoff=0.6)


def freeze(model: nn.Module, *, freeze_llm: bool = False, freeze_vit: bool = False) -> None:
    """Switch gradients off for whole parts; the sin-cos position tables never train."""
    prefixes = (*["language_model."] * freeze_llm, *["vit_model."] * freeze_vit)
    for name, parameter in model.named_parameters():
        if name in POSITION_TABLES or name.startswith(prefixes):
            parameter.requires_grad_(False)


def cut_by_freeze_und(model: Bagel) -> set[str]:
    """Names of parameters that ``freeze_und`` (of the model's config) leaves without a gradient.

    The model detaches the understanding tokens where they enter the decoder and where they leave it, and MoT layers
    compute them without gradients. The shared attention of MoE layers trains on, and so do the understanding MLPs whose
    output later generation tokens attend to. ``lm_head`` comes after the last cut: it trains, with the embeddings if
    these are tied to it.
    """
    llm = model.config.llm
    if not llm.freeze_und:
        return set()
    decoder = "language_model.model."
    cut = ["vit_model.", "connector.", f"{decoder}norm."]
    if not llm.tie_word_embeddings:
        cut.append(f"{decoder}embed_tokens.")
    if llm.layer_module == "Qwen2MoTDecoderLayer":
        cut.append(f"{decoder}layers.")
    else:
        cut.append(f"{decoder}layers.{llm.num_hidden_layers - 1}.mlp.")
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.startswith(tuple(cut)) and "_moe_gen." not in name}


def choose_trainable(
    model: Bagel, *, freeze_llm: bool = False, freeze_vit: bool = False, train_only: Sequence[str] = ()
) -> None:
    """Switch gradients on for exactly what trains. Called before the optimiser is built; the model may be on meta.

    Adapters (`echo4o.train.lora.add_lora` comes first) always train, the layers they adapt never do; of everything else
    then only what `train_only` names. Parameters that no gradient reaches because of ``freeze_und`` are frozen as well:
    they take no memory for gradients, optimiser and average.

    Args:
        train_only: sets (`SETS`) or patterns of names; a parameter trains only if one of them matches. Empty: all do.

    Raises:
        ConfigError: if a pattern matches nothing that could train.
    """
    model.requires_grad_(True)
    freeze(model, freeze_llm=freeze_llm, freeze_vit=freeze_vit)
    cut = cut_by_freeze_und(model)
    adapted = any(is_adapter(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in cut or ".base_layer." in name:
            parameter.requires_grad_(False)
    able = {public_name(name): p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    chosen = _matching(model, able, train_only) if train_only else set() if adapted else set(able)
    for name, parameter in able.items():
        parameter.requires_grad_(name in chosen)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that trains; a tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _matching(model: Bagel, able: Collection[str], patterns: Sequence[str]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        matches = selector(pattern)
        found = {name for name in able if matches(name)}
        if not found:
            names = [public_name(name) for name, _ in model.named_parameters()]
            if any(matches(name) for name in names):
                raise ConfigError(
                    f"train_only: {pattern!r} matches only parameters that cannot train. Fixed tables never do; clear "
                    "freeze_llm, freeze_vit or freeze_und for others, and adapted layers stay frozen beside LoRA."
                )
            raise ConfigError(nothing_matches("train_only", pattern, names))
        chosen |= found
    return chosen
