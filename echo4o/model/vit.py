"""SigLIP vision tower on packed patches of images of any size (NaViT): parameter names as in SigLIP's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo4o.model.attention import Attention
from echo4o.model.config import ViTConfig
from echo4o.model.embeddings import activation


class VisionEmbeddings(nn.Module):
    def __init__(self, config: ViTConfig, rope: bool) -> None:
        super().__init__()
        patch_dim = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size)
        self.position_embedding = None if rope else nn.Embedding(config.num_patches_per_side**2, config.hidden_size)

    def forward(self, pixels: Tensor, position_ids: Tensor) -> Tensor:
        x = self.patch_embedding(pixels)
        return x if self.position_embedding is None else x + self.position_embedding(position_ids)


class VisionRope(nn.Module):
    """Row angles rotate the first half of each head, column angles the second; one table row per grid position."""

    def __init__(self, head_dim: int, side: int) -> None:
        super().__init__()
        self.head_dim, self.side = head_dim, side
        for name in ("cos_h", "sin_h", "cos_w", "sin_w"):
            self.register_buffer(name, torch.empty(side * side, head_dim // 2))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half = self.head_dim // 2
        frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        line = torch.arange(self.side, dtype=torch.float32)[:, None] * frequencies
        line = torch.cat([line, line], dim=1)  # (side, half)
        rows = line.repeat_interleave(self.side, dim=0)
        columns = line.repeat(self.side, 1)
        for name, table in (
            ("cos_h", rows.cos()),
            ("sin_h", rows.sin()),
            ("cos_w", columns.cos()),
            ("sin_w", columns.sin()),
        ):
            getattr(self, name).copy_(table)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        tables = (self.get_buffer(name) for name in ("cos_h", "sin_h", "cos_w", "sin_w"))
        return tuple(table[position_ids][:, None] for table in tables)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _apply_rope(x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    cos_h, sin_h, cos_w, sin_w = rope
    h, w = x.chunk(2, dim=-1)
    return torch.cat([h * cos_h + _rotate_half(h) * sin_h, w * cos_w + _rotate_half(w) * sin_w], dim=-1).to(x.dtype)


class VisionAttention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, attend: Attention, rope: tuple[Tensor, ...] | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = _apply_rope(q, rope), _apply_rope(k, rope)
        return self.out_proj(attend(q, k, v).flatten(-2))


class VisionMLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.act = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, attend: Attention, rope: tuple[Tensor, ...] | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attend, rope)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: ViTConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(num_layers))


class VisionTransformer(nn.Module):
    def __init__(self, config: ViTConfig, num_layers: int, rope: bool) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config, rope)
        head_dim = config.hidden_size // config.num_attention_heads
        self.rope = VisionRope(head_dim, config.num_patches_per_side) if rope else None
        self.encoder = VisionEncoder(config, num_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor, position_ids: Tensor, attend: Attention) -> Tensor:
        x = self.embeddings(pixels, position_ids)
        rope = None if self.rope is None else self.rope(position_ids)
        for layer in self.encoder.layers:
            x = layer(x, attend, rope)
        return self.post_layernorm(x)


def _lecun_normal_(weight: Tensor) -> None:
    """Normal of variance 1 / fan-in, cut at two standard deviations (0.8796 restores the variance lost by the cut)."""
    std = weight.shape[1] ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class SiglipVisionModel(nn.Module):
    """`vision_model` behind one more name, as SigLIP's checkpoints have it."""

    def __init__(self, config: ViTConfig, num_layers: int, rope: bool) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config, num_layers, rope)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """SigLIP's initialisation: Xavier in the attention, LeCun elsewhere, zero biases."""
        vision = self.vision_model
        for name, module in vision.named_modules():
            if isinstance(module, nn.Linear):
                if ".self_attn." in name:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    _lecun_normal_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if vision.embeddings.position_embedding is not None:
            table = vision.embeddings.position_embedding.weight
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
        if vision.rope is not None:
            vision.rope.reset_parameters()

    def forward(self, pixels: Tensor, position_ids: Tensor, attend: Attention) -> Tensor:
        """pixels (n, patch² · 3), position_ids (n,) → features (n, hidden) before the connector."""
        return self.vision_model(pixels, position_ids, attend)
