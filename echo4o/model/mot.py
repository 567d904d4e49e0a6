"""Mixture of transformers: a Qwen2 decoder whose tokens are split between two sets of experts that share one attention.

The hidden stream is a pair of contiguous blocks, understanding tokens (text, ViT, markers) and generation tokens (VAE
latents). Each expert works on its block; one permutation an attention call brings q, k and v into sequence order, one
brings the result back. Three decoder kinds differ only in which modules are doubled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from echo4o.model.attention import Attention
from echo4o.model.config import LLMConfig


class Blocks(NamedTuple):
    """A tensor over all tokens as its understanding rows and its generation rows."""

    und: Tensor  # (n_und, …)
    gen: Tensor  # (n_gen, …)


class _ToSequence(torch.autograd.Function):
    """Rows of both blocks to their places in the sequence; a permutation, so its gradient is a gather."""

    @staticmethod
    def forward(ctx, und: Tensor, gen: Tensor, und_at: Tensor, gen_at: Tensor) -> Tensor:
        ctx.save_for_backward(und_at, gen_at)
        out = und.new_empty(und.shape[0] + gen.shape[0], *und.shape[1:])
        return out.index_copy_(0, und_at, und).index_copy_(0, gen_at, gen)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = [
            grad.index_select(0, at) if needed else None
            for at, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        return *grads, None, None


class _ToBlocks(torch.autograd.Function):
    """Inverse of `_ToSequence`."""

    @staticmethod
    def forward(ctx, x: Tensor, und_at: Tensor, gen_at: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(und_at, gen_at)
        return x.index_select(0, und_at), x.index_select(0, gen_at)

    @staticmethod
    def backward(ctx, grad_und: Tensor, grad_gen: Tensor):
        und_at, gen_at = ctx.saved_tensors
        grad = grad_und.new_empty(grad_und.shape[0] + grad_gen.shape[0], *grad_und.shape[1:])
        return grad.index_copy_(0, und_at, grad_und).index_copy_(0, gen_at, grad_gen), None, None


@dataclass(frozen=True)
class Order:
    """Where the rows of the two blocks lie in the sequence; together a permutation of its positions."""

    und_at: Tensor  # (n_und,) int64
    gen_at: Tensor  # (n_gen,) int64

    def to_sequence(self, blocks: Blocks) -> Tensor:
        # Frozen bfloat16 weights beside float32 ones give blocks of two dtypes under autocast.
        dtype = torch.promote_types(blocks.und.dtype, blocks.gen.dtype)
        return _ToSequence.apply(blocks.und.to(dtype), blocks.gen.to(dtype), self.und_at, self.gen_at)

    def to_blocks(self, x: Tensor) -> Blocks:
        return Blocks(*_ToBlocks.apply(x, self.und_at, self.gen_at))


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share."""

    order: Order
    rope: tuple[Blocks, Blocks]  # cosines and sines, each (n, 1, head_dim) per block
    attend: Attention
    #: Rows of each block whose output is wanted (None: all), with the order of their queries.
    wanted: tuple[Tensor, Tensor] | None = None
    query_order: Order | None = None

    def choose(self, blocks: Blocks) -> Blocks:
        if self.wanted is None:
            return blocks
        return Blocks(*(x.index_select(0, rows) for x, rows in zip(blocks, self.wanted, strict=True)))


def rope_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, 1, head_dim) of rotary position embedding (Su et al., 2021), Qwen2's half-split form."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _RMSNorm(torch.autograd.Function):
    """weight · x / rms(x) in float32; keeps x and one number a row for backward, where autograd would keep three x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse_rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (x.float() * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad = grad.float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.float()
        grad -= normed.mul_((grad * normed).mean(-1, keepdim=True))
        return grad.mul_(inverse_rms).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping only its inputs for backward."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class SelfAttention(nn.Module):
    """Grouped-query attention over the whole pack. With `experts`, generation tokens have projections of their own."""

    def __init__(self, config: LLMConfig, experts: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.experts = experts
        q_dim, kv_dim = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        for suffix in ("", "_moe_gen") if experts else ("",):
            setattr(self, f"q_proj{suffix}", nn.Linear(config.hidden_size, q_dim))
            setattr(self, f"k_proj{suffix}", nn.Linear(config.hidden_size, kv_dim))
            setattr(self, f"v_proj{suffix}", nn.Linear(config.hidden_size, kv_dim))
            setattr(self, f"o_proj{suffix}", nn.Linear(q_dim, config.hidden_size, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                setattr(self, f"{name}{suffix}", norm)

    def _expert(self, name: str, gen: bool) -> nn.Module:
        return getattr(self, f"{name}_moe_gen" if gen and self.experts else name)

    def _project(self, name: str, x: Tensor, gen: bool) -> Tensor:
        """(n, hidden) → (n, heads, head_dim)."""
        return self._expert(f"{name}_proj", gen)(x).unflatten(-1, (-1, self.head_dim))

    def _rotated(self, name: str, blocks: Blocks, rope: tuple[Blocks, Blocks], freeze_und: bool) -> Blocks:
        out = []
        for gen, x, cos, sin in zip((False, True), blocks, *rope, strict=True):
            with torch.no_grad() if freeze_und and not gen else nullcontext():
                out.append(apply_rope(self._expert(f"{name}_norm", gen)(self._project(name, x, gen)), cos, sin))
        return Blocks(*out)

    def forward(self, x: Blocks, step: Step, freeze_und: bool) -> Blocks:
        """x → attention output of the wanted rows."""
        query_order = step.query_order or step.order
        rope = step.rope
        query_rope = (step.choose(rope[0]), step.choose(rope[1]))
        q = self._rotated("q", step.choose(x), query_rope, freeze_und)
        k = self._rotated("k", x, rope, freeze_und)
        with torch.no_grad() if freeze_und else nullcontext():
            v_und = self._project("v", x.und, gen=False)
        v = step.order.to_sequence(Blocks(v_und, self._project("v", x.gen, gen=True)))
        # Under autocast the norms leave q and k in float32 while v is bfloat16.
        out = step.attend(query_order.to_sequence(q).to(v.dtype), step.order.to_sequence(k).to(v.dtype), v)
        out = query_order.to_blocks(out.flatten(-2))
        with torch.no_grad() if freeze_und else nullcontext():
            und = self._expert("o_proj", False)(out.und)
        return Blocks(und, self._expert("o_proj", True)(out.gen))


class DecoderLayer(nn.Module):
    """One layer of any of upstream's three kinds.

    ====================  =========  ====  =====
    kind                  attention  mlp   norms
    ====================  =========  ====  =====
    Qwen2MoTDecoderLayer  doubled    dbl.  dbl.
    Qwen2MoEDecoderLayer  shared     dbl.  shared
    Qwen2DecoderLayer     shared     one   shared
    ====================  =========  ====  =====
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        is_mot = config.layer_module == "Qwen2MoTDecoderLayer"
        self.self_attn = SelfAttention(config, experts=is_mot)
        self.mlp = MLP(config)
        self.mlp_moe_gen = MLP(config) if config.layer_module != "Qwen2DecoderLayer" else None
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps))
            setattr(self, f"{name}_moe_gen", RMSNorm(config.hidden_size, config.rms_norm_eps) if is_mot else None)
        self.config = config

    @property
    def freeze_und(self) -> bool:
        """Only MoT layers stop gradients of their own; the shared attention of MoE layers trains on (upstream)."""
        return self.config.freeze_und and self.self_attn.experts

    def _by_block(self, name: str, x: Blocks) -> Blocks:
        und, gen = getattr(self, name), getattr(self, f"{name}_moe_gen")
        with torch.no_grad() if self.freeze_und else nullcontext():
            x_und = und(x.und)
        return Blocks(x_und, (gen or und)(x.gen))

    def forward(self, und: Tensor, gen: Tensor, step: Step) -> Blocks:
        """und (n_und, d), gen (n_gen, d) → the same of the wanted rows."""
        x = Blocks(und, gen)
        attended = self.self_attn(self._by_block("input_layernorm", x), step, self.freeze_und)
        x = Blocks(*(a + b for a, b in zip(step.choose(x), attended, strict=True)))
        fed = self._by_block("mlp", self._by_block("post_attention_layernorm", x))
        return Blocks(*(a + b for a, b in zip(x, fed, strict=True)))


class Qwen2Model(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        experts = config.layer_module != "Qwen2DecoderLayer"
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps) if experts else None

    def forward(self, und: Tensor, gen: Tensor, step: Step, last_step: Step | None = None) -> Blocks:
        """und (n_und, d), gen (n_gen, d) → final hidden states; with `last_step`, of the rows it wants."""
        und, gen = self.through_layers(und, gen, step, last_step)
        gen = self.final_gen_norm(gen)
        und = self.norm(und)
        return Blocks(und.detach() if self.config.freeze_und else und, gen)

    def through_layers(self, und: Tensor, gen: Tensor, step: Step, last_step: Step | None = None) -> Blocks:
        """The output of the last layer, before the final norms."""
        if self.config.freeze_und:
            und = und.detach()
        for i, layer in enumerate(self.layers):
            is_last = i + 1 == len(self.layers)
            und, gen = layer(und, gen, last_step if is_last and last_step else step)
        return Blocks(und, gen)

    def final_gen_norm(self, gen: Tensor) -> Tensor:
        return (self.norm_moe_gen or self.norm)(gen)


class OutputHead(nn.Linear):
    """Hidden states to words. Its loss is computed inside, so that a step calls it once, however much text there is:
    where weights are sharded, every call gathers them, and all ranks have to make equally many."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, chunk: int = 1024) -> Tensor:
        """hidden (n, d) → logits (n, words); with labels (n,) → cross-entropies (n,) in float32.

        Args:
            chunk: rows whose logits are alive at once; those of further chunks are recomputed in the backward pass.
        """
        if labels is None:
            return super().forward(hidden)
        if len(hidden) <= chunk:
            return self._losses(hidden, labels)
        chunks = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        return torch.cat([checkpoint(self._losses, *part, use_reentrant=False) for part in chunks])

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(hidden).float(), labels, reduction="none")


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Qwen2's initialisation: normal weights, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    @torch.no_grad()
    def init_moe(self) -> list[tuple[str, str]]:
        """Copy every understanding parameter to its generation twin; returns (copy, original) names."""
        parameters = dict(self.named_parameters())
        copied = []
        for name, parameter in parameters.items():
            if "moe_gen" in name:
                original = name.replace("_moe_gen", "")
                parameter.copy_(parameters[original])
                copied.append((name, original))
        return copied
