"""Read a parity case: the reference model's folder, its packed batch, its recorded outputs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from echo4o.model.embeddings import patchify_latents
from echo4o.packed import PackedBatch

CASES = ["multiref", "mixed", "frames"]
EXTRA_CASES = [
    "dense", "gen_only", "interpolate_pos", "moe", "no_qk_norm",
    "ten_refs", "tied", "timestep_shift", "und_only", "vit_rope",
]  # fmt: skip
ALL_CASES = CASES + [f"extra/{name}" for name in EXTRA_CASES]

BATCH_TENSORS = [
    "packed_text_ids", "packed_text_indexes", "packed_position_ids", "packed_vit_tokens", "packed_vit_token_indexes",
    "packed_vit_position_ids", "vit_token_seqlens", "packed_latent_position_ids", "packed_vae_token_indexes",
    "packed_timesteps", "mse_loss_indexes", "packed_label_ids", "ce_loss_indexes", "ce_loss_weights",
]  # fmt: skip


class Reference:
    """One case of the golden files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "batch.safetensors")
        self.meta = json.loads((folder / "batch.json").read_text())
        self.outputs = load_file(folder / "outputs.safetensors")
        self.expected = json.loads((folder / "outputs.json").read_text())

    def batch(self) -> PackedBatch:
        num_splits = len(self.meta["flex"]["split_lens"]) - (
            sum(self.meta["flex"]["sample_lens"]) > self.meta["sequence_length"]
        )
        fields = {name: self.tensors[name] for name in BATCH_TENSORS if name in self.tensors}
        return PackedBatch(
            sequence_length=self.meta["sequence_length"],
            sample_lens=self.meta["sample_lens"],
            split_lens=self.meta["flex"]["split_lens"][:num_splits],
            attn_modes=self.meta["flex"]["attn_modes"][:num_splits],
            patchified_vae_latent_shapes=self.meta.get("patchified_vae_latent_shapes") or None,
            **fields,
        )

    def latents(self) -> torch.Tensor | None:
        """(n_vae, p·p·C): the reference's latents without their padding."""
        if "padded_latent" not in self.outputs:
            return None
        shapes = self.meta["patchified_vae_latent_shapes"]
        latents = [x[:, : 2 * h, : 2 * w] for x, (h, w) in zip(self.outputs["padded_latent"], shapes, strict=True)]
        return patchify_latents(latents, patch=2)

    def noise(self) -> torch.Tensor | None:
        return self.outputs.get("flow_noise")
