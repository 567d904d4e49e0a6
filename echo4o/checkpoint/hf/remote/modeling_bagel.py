"""BAGEL for transformers: upstream's tensor names, a packed sequence in, losses and hidden states out.

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True, dtype="bfloat16")
images = model.pipeline()("A cat on a sofa.", seed=0).images     # with echo4o installed
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from echo4o.checkpoint.hf.remote.configuration_bagel import BagelConfig
from echo4o.model.bagel import Bagel
from echo4o.model.embeddings import PositionTable
from echo4o.model.mot import OutputHead, Qwen2ForCausalLM
from echo4o.model.vae import WEIGHTS_FILE, AutoEncoder
from echo4o.model.vit import VisionRope
from echo4o.packed import PackedBatch


@dataclass
class BagelModelOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean of ``mse`` plus mean of ``ce``; a zero with a gradient where there are neither.
        mse: (n_mse, p·p·C) squared velocity errors in the order of ``mse_loss_indexes``.
        ce: (n_ce,) cross-entropies in the order of ``ce_loss_indexes``.
        last_hidden_state: (sequence_length, hidden) in sequence order.
    """

    loss: Tensor | None = None
    mse: Tensor | None = None
    ce: Tensor | None = None
    last_hidden_state: Tensor | None = None


class BagelForConditionalGeneration(PreTrainedModel):
    """A `Bagel` whose modules are this model's own: names, adapters and hooks are the same for both."""

    config_class = BagelConfig
    base_model_prefix = ""
    main_input_name = "packed_text_ids"
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    # Published indexes list the autoencoder's file too; `load_vae` reads that.
    _keys_to_ignore_on_load_unexpected = [r"^(encoder|decoder)\."]
    # Fixed tables: their formula fills them.
    _keys_to_ignore_on_load_missing = [r"^(latent|vit)_pos_embed\.", r"^vit_model\.vision_model\.rope\."]
    _no_split_modules = ["DecoderLayer", "VisionLayer"]
    _supports_sdpa = True
    bagel: Bagel
    language_model: Qwen2ForCausalLM

    def __init__(self, config: BagelConfig, *inputs: Any, **options: Any) -> None:
        super().__init__(config, *inputs, **options)
        bagel = Bagel(config.to_architecture())
        # One dictionary of modules for both: whoever replaces a module here (LoRA does) replaces it there too.
        self._modules = bagel._modules
        # Beside the registered modules: as one of them it would give every tensor a second name.
        self.__dict__["bagel"] = bagel
        if bagel.device.type != "meta":
            for module in self.modules():
                module.__dict__["_is_hf_initialized"] = True  # by Bagel, as upstream does
        self.post_init()

    # ------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(cls, *inputs: Any, **options: Any) -> Any:
        """As every model of transformers."""
        loaded = super().from_pretrained(*inputs, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, PositionTable):
                module.requires_grad_(False)  # transformers makes new parameters, which would all be trained
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill a module whose weights are in no file: fixed tables by their formula, others anew."""
        if isinstance(module, PositionTable | VisionRope):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and module is self._modules.get("llm2vae"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: OutputHead) -> None:
        self.language_model.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """Grow (never shrink) the vocabulary; new rows start at the mean of the old ones."""
        self.bagel.resize_token_embeddings(new_num_tokens or 0)
        self.config.llm_config = {**self.config.llm_config, "vocab_size": self.bagel.config.llm.vocab_size}
        return self.get_input_embeddings()

    # ------------------------------------------------------------ forward

    def set_attention_kernel(self, name: str = "auto") -> str:
        """``sdpa``, ``flex``, ``flash`` or ``auto``, for the model's current device; returns the one chosen.

        Raises:
            KernelError: if it is unknown or cannot run here.
        """
        return self.bagel.set_attention_kernel(name)

    def forward(
        self,
        batch: PackedBatch | None = None,
        packed_latents: Tensor | None = None,
        noise: Tensor | None = None,
        return_hidden: bool = True,
        return_dict: bool = True,
        **fields: Any,
    ) -> BagelModelOutput | tuple:
        """One packed sequence through the model.

        Args:
            batch: on the model's device; or leave it out and pass its fields by name (`PackedBatch`).
            packed_latents: (n_vae, p·p·C) clean latent tokens, in the order of ``packed_vae_token_indexes``.
            noise: (n_vae, p·p·C) flow noise; drawn from the global generator if None.
            return_hidden: False skips ``last_hidden_state`` and with it the last layer's rows that feed no loss.

        Raises:
            ValueError: if the batch has generation tokens but no latents, or tokens that belong to no modality.
            TypeError: for fields that a batch does not have.
        """
        if batch is not None and fields:
            raise TypeError(f"pass a batch or its fields, not both: {', '.join(sorted(fields))}")
        out = self.bagel(batch or PackedBatch(**fields), packed_latents, noise, return_hidden)
        parts = [part.mean() for part in (out.mse, out.ce) if part is not None]
        loss = torch.stack(parts).sum() if parts else out.nothing
        result = BagelModelOutput(loss, out.mse, out.ce, out.last_hidden_state)
        return result if return_dict else result.to_tuple()

    # ------------------------------------------------------------ what lies beside the weights

    def load_vae(
        self,
        folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> AutoEncoder:
        """FLUX's autoencoder from ``ae.safetensors``.

        Args:
            folder: or a repository of the hub; by default where this model came from.
            revision: of that repository.

        Raises:
            OSError: if there is no such file.
        """
        path = cached_file(str(folder or self.name_or_path), WEIGHTS_FILE, revision=revision)
        assert path is not None
        config = self.bagel.config.vae if folder is None and self.config.vae_config else None
        return AutoEncoder.from_pretrained(path, config, dtype, device)

    def pipeline(self, folder: str | Path | None = None, **options: Any) -> Any:
        """An ``Echo4oPipeline`` (prompt and references in, images and text out) that shares these weights.

        Args:
            folder: with tokenizer and autoencoder, or a repository of the hub; by default where this model came from.
            options: of ``echo4o.generate.in_memory.pipeline``.

        Raises:
            ImportError: if echo4o is not installed.
        """
        try:
            in_memory = importlib.import_module("echo4o.generate.in_memory")
        except ImportError as error:
            raise ImportError(
                f"pictures and texts are generated by echo4o, which is not installed here ({error}): "
                "pip install -e FOLDER in a checkout of echo4o, or call this model's forward()"
            ) from error
        values = self.config.to_dict()
        return in_memory.pipeline(self.state_dict(keep_vars=True), values, folder or self.name_or_path, **options)
