"""Names of tensors: upstream's, whatever wrappers (LoRA, compilation) sit between."""

from __future__ import annotations

import re

#: In front of every name of an adapter file (peft's format).
ADAPTER_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.base_layer(?=\.)|\._orig_mod(?=\.)|(?<=\.lora_A)\.default|(?<=\.lora_B)\.default")


def public_name(name: str) -> str:
    """``….q_proj.base_layer.weight`` → ``….q_proj.weight``, ``….lora_A.default.weight`` → ``….lora_A.weight``."""
    return _WRAPPERS.sub("", name)


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
