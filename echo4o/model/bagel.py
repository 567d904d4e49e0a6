"""BAGEL: embeddings → mixture of transformers → heads. One packed sequence in, per-token losses out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from echo4o.model.attention import Attention, find_varlen_attention, plan_attention, resolve_kernel
from echo4o.model.config import BagelConfig
from echo4o.model.embeddings import Connector, PositionTable, TimestepEmbedder, shift_time
from echo4o.model.mot import Blocks, Order, Qwen2ForCausalLM, Step, rope_tables
from echo4o.model.parts import part_of
from echo4o.model.pretrained import find_weights, load_weights
from echo4o.model.vit import SiglipVisionModel
from echo4o.packed import AttentionLayout, PackedBatch

logger = logging.getLogger(__name__)

#: Rows of logits held at once by the cross-entropy head (152k words each in the 7B model).
CE_CHUNK = 1024


@dataclass
class BagelOutput:
    """What a forward pass returns.

    Attributes:
        mse: (n_mse, p·p·C) squared velocity errors in the order of ``mse_loss_indexes``; None if there are none.
        ce: (n_ce,) cross-entropies in the order of ``ce_loss_indexes``; None if there are none.
        last_hidden_state: (sequence_length, hidden) in sequence order, if asked for.
        nothing: where there are neither, a zero that depends on every parameter all the same.
    """

    mse: Tensor | None
    ce: Tensor | None
    last_hidden_state: Tensor | None
    nothing: Tensor | None = None


class Bagel(nn.Module):
    """State dict names and shapes are upstream's."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm.hidden_size
        self.language_model = Qwen2ForCausalLM(config.llm)
        if config.visual_gen:
            self.time_embedder = TimestepEmbedder(hidden)
            self.vae2llm = nn.Linear(config.latent_dim, hidden)
            self.llm2vae = nn.Linear(hidden, config.latent_dim)
            self.latent_pos_embed = PositionTable(config.max_latent_size, hidden)
        if config.visual_und and config.vit:
            self.vit_model = SiglipVisionModel(config.vit, config.num_vit_layers, config.vit_rope)
            self.connector = Connector(config.vit.hidden_size, hidden, config.connector_act)
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, hidden)
        self.attention_kernel = self.vit_attention_kernel = "sdpa"
        if not self.language_model.lm_head.weight.is_meta:
            self.reset_parameters()

    # ------------------------------------------------------------ weights

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Upstream's initialisation; llm2vae starts at zero, so a new model predicts zero velocity."""
        for module in self.children():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if self.config.visual_gen:
            nn.init.zeros_(self.llm2vae.weight)
            nn.init.zeros_(self.llm2vae.bias)

    @torch.no_grad()
    def reset_tables(self) -> None:
        """Fill the fixed tables (positions, ViT rotations), which need no weights file."""
        for name in ("latent_pos_embed", "vit_pos_embed"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()
        if self.config.visual_und and self.vit_model.vision_model.rope is not None:
            self.vit_model.vision_model.rope.reset_parameters()

    def table_names(self) -> list[str]:
        """State-dict names of the fixed tables; a weights file may lack them."""
        tables = ("latent_pos_embed.", "vit_pos_embed.", "vit_model.vision_model.rope.")
        return [name for name in self.state_dict(keep_vars=True) if name.startswith(tables)]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        weights: str | None = None,
        config: BagelConfig | None = None,
        **overrides,
    ) -> Bagel:
        """Load an upstream folder without a second copy in memory.

        Args:
            folder: ``llm_config.json``, ``vit_config.json``, optional ``config.json``, and ``ema.safetensors`` or
                ``model.safetensors`` (single file or sharded).
            weights: ``ema`` or ``model``; None takes ``ema`` if it exists, else ``model``.
            config: used instead of the folder's.
            overrides: fields of `BagelConfig` or `LLMConfig` to set instead, such as ``freeze_und=True``.

        Raises:
            FileNotFoundError: if there are no such weights.
            ValueError: if tensors are missing or have another shape.
        """
        path = find_weights(folder, weights)
        if path is None:
            wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
            raise FileNotFoundError(f"{folder} has no {wanted} (nor a sharded index of it)")
        with torch.device("meta"):
            model = cls(config or BagelConfig.from_pretrained(folder, **overrides))
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).to_empty(device=device)
        model.language_model.tie_weights()  # to_empty gives every name a storage of its own
        model.reset_tables()
        unexpected = model.load_weights(path)
        if unexpected:
            logger.warning("%s has %d tensors this config does not use, e.g. %s", path, len(unexpected), unexpected[0])
        return model

    def load_weights(self, path: str | Path) -> list[str]:
        """Read a weights file into this model; returns the names it holds that the model lacks."""
        head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        aliases = {head: embedding, embedding: head} if self.config.llm.tie_word_embeddings else {}
        return load_weights(self, Path(path), optional=self.table_names(), aliases=aliases)

    def init_moe(self) -> list[tuple[str, str]]:
        """Start the generation experts as copies of the understanding experts (``copy_init_moe``)."""
        return self.language_model.init_moe()

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Grow (never shrink) the vocabulary; new rows start at the mean of the old ones."""
        old = self.config.llm.vocab_size
        if vocab_size <= old:
            return
        heads = [self.language_model.model.embed_tokens, self.language_model.lm_head]
        for module in heads[:1] if self.config.llm.tie_word_embeddings else heads:
            weight = module.weight
            grown = weight.new_empty(vocab_size, weight.shape[1])
            grown[:old], grown[old:] = weight, weight.mean(dim=0)
            module.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
        heads[0].num_embeddings = heads[1].out_features = self.config.llm.vocab_size = vocab_size
        self.language_model.tie_weights()

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by the part of the model that users think in (`part_of`)."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            parts.setdefault(part_of(name), []).append((name, parameter))
        return parts

    # ------------------------------------------------------------ attention kernel

    def set_attention_kernel(self, name: str = "auto") -> str:
        """Choose the kernel for the model's current device; returns the one chosen.

        Raises:
            KernelError: if it is unknown or cannot run here, with the remedy.
        """
        self.attention_kernel = resolve_kernel(name, self.device)
        has_varlen = self.attention_kernel == "flex" and find_varlen_attention() is not None
        # The ViT's splits are whole images: variable-length attention fits them without any mask.
        self.vit_attention_kernel = "flash" if has_varlen else self.attention_kernel
        return self.attention_kernel

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    # ------------------------------------------------------------ forward

    def forward(
        self,
        batch: PackedBatch,
        packed_latents: Tensor | None = None,
        noise: Tensor | None = None,
        return_hidden: bool = True,
    ) -> BagelOutput:
        """One packed sequence through the model.

        Args:
            batch: on the model's device.
            packed_latents: (n_vae, p·p·C) clean latent tokens, in the order of ``packed_vae_token_indexes``.
            noise: (n_vae, p·p·C) flow noise; drawn from the global generator if None.
            return_hidden: False skips ``last_hidden_state`` and with it the last layer's rows that feed no loss.

        Raises:
            ValueError: if the batch has generation tokens but no latents, or tokens that belong to no modality.
        """
        packed_latents = self._checked_latents(batch, packed_latents)
        noise = torch.randn_like(packed_latents) if noise is None else noise
        times = self._times_of_images(batch)
        t = self._per_token(times, batch)[:, None]
        noised, target = (1 - t) * packed_latents + t * noise, noise - packed_latents

        und, gen, order = self._embed(batch, noised, times)
        attend = plan_attention(self.attention_kernel, batch.layout, order.und_at.device)
        step = self._step(batch, order, attend, dtype=und.dtype)
        last_step = None if return_hidden else self._last_step(batch, step)
        hidden = self.language_model.model(und, gen, step, last_step)
        wanted = (last_step or step).wanted
        und_at, gen_at = (
            (order.und_at, order.gen_at) if wanted is None else (order.und_at[wanted[0]], order.gen_at[wanted[1]])
        )

        mse, no_mse = self._velocity_error(batch, hidden.gen, gen_at, target, order)
        ce, no_ce = self._next_token_error(batch, hidden.und, und_at)
        # A head without tokens still runs, on none: every parameter gets a gradient, whatever the batch lacks.
        nothing = no_mse + no_ce if no_mse is not None and no_ce is not None else None
        mse = mse if mse is None or no_ce is None else mse + no_ce
        ce = ce if ce is None or no_mse is None else ce + no_mse
        return BagelOutput(mse, ce, order.to_sequence(hidden) if return_hidden else None, nothing)

    def hidden_states(
        self, batch: PackedBatch, latents: Tensor | None, times: Tensor | None, attend: Attention
    ) -> Tensor:
        """One inference step: (sequence_length, hidden) of a packed sequence, in sequence order.

        Args:
            batch: only its tokens and positions are used.
            latents: (n_vae, p·p·C) latent tokens as they are at their time: nothing is mixed in.
            times: (n_vae_images,) time in [0, 1] of each laid-down image, 0 = clean.
            attend: attention of every layer in turn; it may hold earlier keys and values.
        """
        und, gen, order = self._embed(batch, self._checked_latents(batch, latents), times)
        return order.to_sequence(self.language_model.model(und, gen, self._step(batch, order, attend, dtype=und.dtype)))

    def latent_features(self, batch: PackedBatch, latents: Tensor, times: Tensor, attend: Attention) -> Tensor:
        """(n_vae, hidden): the last layer's output of the latent tokens, before the final norm; see `hidden_states`."""
        und, gen, order = self._embed(batch, self._checked_latents(batch, latents), times)
        return self.language_model.model.through_layers(und, gen, self._step(batch, order, attend, und.dtype)).gen

    def velocity(self, features: Tensor) -> Tensor:
        """`latent_features` (n, hidden) → predicted velocity noise − data (n, p·p·C) in float32."""
        return self.llm2vae(self.language_model.model.final_gen_norm(features)).float()

    def _embed(self, batch: PackedBatch, latents: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor, Order]:
        """Understanding rows, generation rows, and where they lie."""
        text = self.language_model.model.embed_tokens(batch.packed_text_ids)
        und = torch.cat([text, self._vit_tokens(batch, text)])
        gen = self._latent_tokens(batch, latents, times, text)
        return und, gen, self._order(batch, num_vit=und.shape[0] - text.shape[0], num_gen=gen.shape[0])

    def _velocity_error(
        self, batch: PackedBatch, hidden: Tensor, at: Tensor, target: Tensor, order: Order
    ) -> tuple[Tensor | None, Tensor | None]:
        """Squared error (n_mse, p·p·C) of the predicted velocity; or None, and a zero that depends on the head."""
        if not batch.num_mse_tokens or not self.config.visual_gen:
            head = self.llm2vae if self.config.visual_gen else nn.Identity()
            return None, head(hidden[:0]).sum()
        assert batch.mse_loss_indexes is not None
        rows = _rows_of(batch.mse_loss_indexes, at, batch.sequence_length)
        prediction = self.llm2vae(hidden[rows])
        rows = _rows_of(batch.mse_loss_indexes, order.gen_at, batch.sequence_length)
        return (prediction.float() - target[rows].float()) ** 2, None

    def _next_token_error(self, batch: PackedBatch, hidden: Tensor, at: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cross-entropy (n_ce,) of the labels; or None, and a zero that depends on the head."""
        if not batch.num_ce_tokens:
            return None, self.language_model.lm_head(hidden[:0]).sum()
        if batch.ce_loss_indexes is None or batch.packed_label_ids is None:
            raise ValueError("ce_loss_indexes and packed_label_ids come together")
        rows = _rows_of(batch.ce_loss_indexes, at, batch.sequence_length)
        return self.language_model.lm_head(hidden[rows], batch.packed_label_ids, CE_CHUNK), None

    def _vit_tokens(self, batch: PackedBatch, like: Tensor) -> Tensor:
        """(n_vit, hidden). The tower also runs on no images, so that every parameter always has a gradient and sharded
        ones are gathered by all ranks alike. Images whose outputs the batch brings along do not pass it."""
        position_ids = batch.packed_vit_position_ids
        if position_ids is None:
            position_ids = torch.zeros(0, dtype=torch.int64, device=like.device)
        if not self.config.visual_und:
            return like.new_zeros(len(position_ids), like.shape[1])  # upstream: rows of absent towers stay zero
        given = batch.vit_features
        if given is None:
            outputs = self._tower(batch, position_ids, self._vit_lengths(batch), like)
        else:
            lengths = self._vit_lengths(batch)
            is_given = torch.tensor(batch.vit_is_encoded, device=like.device)
            rows = is_given.repeat_interleave(torch.tensor(lengths, device=like.device))
            rest = [length for length, known in zip(lengths, batch.vit_is_encoded or (), strict=True) if not known]
            computed = self._tower(batch, position_ids[~rows], rest, like)
            outputs = computed.new_empty(len(position_ids), computed.shape[1])
            outputs[rows], outputs[~rows] = given.to(computed.dtype), computed
        return self.connector(outputs) + self.vit_pos_embed(position_ids)

    @staticmethod
    def _vit_lengths(batch: PackedBatch) -> list[int]:
        """Patches of each ViT image."""
        return [] if batch.vit_token_seqlens is None else torch.as_tensor(batch.vit_token_seqlens).tolist()

    def _tower(self, batch: PackedBatch, position_ids: Tensor, lengths: list[int], like: Tensor) -> Tensor:
        """(n, vit hidden) of ``packed_vit_tokens``: images of so many patches each."""
        if batch.packed_vit_tokens is not None and lengths:
            pixels = batch.packed_vit_tokens.to(like.dtype)
        else:
            pixels = like.new_zeros(0, self.vit_model.vision_model.embeddings.patch_embedding.in_features)
        if lengths:
            layout = AttentionLayout(lengths, lengths, ["full"] * len(lengths))
            attend = plan_attention(self.vit_attention_kernel, layout, like.device)
        else:
            attend = _no_attention
        return self.vit_model(pixels, position_ids, attend)

    def _checked_latents(self, batch: PackedBatch, latents: Tensor | None) -> Tensor:
        num_tokens = 0 if batch.packed_vae_token_indexes is None else len(batch.packed_vae_token_indexes)
        shape = (num_tokens, self.config.latent_dim)
        if not num_tokens or not self.config.visual_gen:
            return torch.zeros(shape, device=batch.packed_text_ids.device)
        if latents is None or latents.shape != shape:
            found = None if latents is None else tuple(latents.shape)
            raise ValueError(f"packed_latents must be {shape} for this batch, not {found}")
        return latents

    def _times_of_images(self, batch: PackedBatch) -> Tensor | None:
        """(n_vae_images,) time in [0, 1]: all tokens of an image share one."""
        if batch.packed_timesteps is None or batch.patchified_vae_latent_shapes is None:
            return None
        lengths = torch.tensor([h * w for h, w in batch.patchified_vae_latent_shapes], dtype=torch.int64)
        starts = (lengths.cumsum(0) - lengths).to(batch.packed_timesteps.device)
        return shift_time(batch.packed_timesteps[starts], self.config.timestep_shift)

    @staticmethod
    def _per_token(images: Tensor | None, batch: PackedBatch) -> Tensor:
        """Rows of laid-down images (n_vae_images, …) repeated for their tokens (n_vae, …)."""
        if images is None or batch.patchified_vae_latent_shapes is None:
            return torch.zeros(0, device=batch.packed_text_ids.device)
        lengths = [h * w for h, w in batch.patchified_vae_latent_shapes]
        repeats = torch.tensor(lengths, dtype=torch.int64, device=images.device)
        return images.repeat_interleave(repeats, dim=0, output_size=sum(lengths))

    def _latent_tokens(self, batch: PackedBatch, latents: Tensor, times: Tensor | None, like: Tensor) -> Tensor:
        """Latents (n_vae, p·p·C) at their times as hidden vectors (n_vae, hidden). Time is embedded once an image."""
        if not self.config.visual_gen:
            return like.new_zeros(len(latents), like.shape[1])  # upstream: rows of absent towers stay zero
        position_ids = batch.packed_latent_position_ids
        if times is None or position_ids is None:
            times, position_ids = like.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=like.device)
            embedded = self.time_embedder(times)
        else:
            embedded = self._per_token(self.time_embedder(times), batch)
        tokens = self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + embedded + self.latent_pos_embed(position_ids)
        return tokens.to(like.dtype)

    def _order(self, batch: PackedBatch, num_vit: int, num_gen: int) -> Order:
        if len(batch.packed_text_ids) + num_vit + num_gen != batch.sequence_length:
            raise ValueError(
                f"{batch.sequence_length} tokens, but {len(batch.packed_text_ids)} text, {num_vit} ViT, {num_gen} VAE: "
                "every token must belong to exactly one modality"
            )
        empty = batch.packed_text_indexes[:0]
        vit_at, gen_at = batch.packed_vit_token_indexes, batch.packed_vae_token_indexes
        und_at = torch.cat([batch.packed_text_indexes, empty if vit_at is None else vit_at])
        return Order(und_at, empty if gen_at is None else gen_at)

    def _step(self, batch: PackedBatch, order: Order, attend: Attention, dtype: torch.dtype) -> Step:
        llm = self.config.llm
        tables = rope_tables(batch.packed_position_ids, llm.head_dim, llm.rope_theta, dtype)
        cos, sin = (Blocks(table[order.und_at], table[order.gen_at]) for table in tables)
        return Step(order, (cos, sin), attend)

    def _last_step(self, batch: PackedBatch, step: Step) -> Step | None:
        """The last layer's step: only the splits that feed a loss are computed, over everybody's keys."""
        splits = batch.layout.splits
        indexes = [
            index for index in (batch.ce_loss_indexes, batch.mse_loss_indexes) if index is not None and len(index)
        ]
        if not indexes:
            return None
        ends = torch.tensor([split.end for split in splits])
        selected = torch.bucketize(torch.cat(indexes).cpu(), ends, right=True).unique().tolist()
        keep = torch.zeros(batch.sequence_length, dtype=torch.bool)
        for i in selected:
            keep[splits[i].start : splits[i].end] = True
        device = step.order.und_at.device
        compact = (keep.cumsum(0) - 1).to(device)
        keep = keep.to(device)
        und, gen = (keep[at].nonzero().flatten() for at in (step.order.und_at, step.order.gen_at))
        query_order = Order(compact[step.order.und_at[und]], compact[step.order.gen_at[gen]])
        attend = plan_attention(self.attention_kernel, batch.layout, device, selected)
        return Step(step.order, step.rope, attend, (und, gen), query_order)


def _no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over no tokens, still a function of all three."""
    return q + 0 * (k + v)


def _rows_of(positions: Tensor, at: Tensor, num_positions: int) -> Tensor:
    """Rows of a block whose sequence positions are `at` that lie at `positions`."""
    row_of = torch.empty(num_positions, dtype=torch.int64, device=at.device)
    row_of[at] = torch.arange(len(at), device=at.device)
    return row_of[positions]
