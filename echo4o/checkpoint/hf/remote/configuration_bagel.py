"""``config.json`` of a BAGEL folder for transformers.

config = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from echo4o.model.config import BagelConfig as Architecture

#: What the model is besides its three parts; each has a default of the architecture's.
SCALARS = tuple(field.name for field in dataclasses.fields(Architecture) if field.name not in ("llm", "vit", "vae"))

_OF_LLM = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _of_llm(name: str) -> property:
    return property(lambda config: (config.llm_config or {}).get(name))


class BagelConfig(PretrainedConfig):
    """The three parts as plain dictionaries under the names that upstream's readers know, and the scalars beside them.

    Args:
        llm_config, vit_config, vae_config: fields of Qwen2's decoder, SigLIP's encoder, FLUX's autoencoder.
        tie_word_embeddings: by default as ``llm_config`` says.
        others: `SCALARS`, and what transformers adds.
    """

    model_type = "bagel"

    # Trainers and launchers ask the config itself for the decoder's sizes.
    hidden_size = _of_llm("hidden_size")
    intermediate_size = _of_llm("intermediate_size")
    num_hidden_layers = _of_llm("num_hidden_layers")
    num_attention_heads = _of_llm("num_attention_heads")
    num_key_value_heads = _of_llm("num_key_value_heads")
    vocab_size = _of_llm("vocab_size")

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        vit_config: dict[str, Any] | None = None,
        vae_config: dict[str, Any] | None = None,
        tie_word_embeddings: bool | None = None,
        **others: Any,
    ) -> None:
        self.llm_config, self.vit_config, self.vae_config = llm_config, vit_config, vae_config
        for name in SCALARS:
            if name in others:
                setattr(self, name, others.pop(name))
        for name in _OF_LLM:
            others.pop(name, None)  # properties
        llm = llm_config or {}
        if tie_word_embeddings is None:
            # Without a layer_module it is the original Qwen2's file, and BAGEL unties that one's embeddings.
            tie_word_embeddings = "layer_module" in llm and bool(llm.get("tie_word_embeddings"))
        others["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**others)

    def to_architecture(self) -> Architecture:
        """Everything that determines the model's tensors, missing fields filled in.

        Raises:
            ValueError: for values that are missing or contradict each other.
        """
        values = {name: getattr(self, name) for name in SCALARS if hasattr(self, name)}
        parts = {"llm_config": self.llm_config, "vit_config": self.vit_config, "vae_config": self.vae_config}
        return Architecture.from_values(
            values | parts | {"tie_word_embeddings": self.tie_word_embeddings}, freeze_und=False
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """Every scalar is written out, default or not: other readers have other defaults."""
        return {name: getattr(self, name) for name in SCALARS if hasattr(self, name)} | super().to_diff_dict()
