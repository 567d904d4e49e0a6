"""Packed attention behind one interface, three kernels: ``sdpa`` (CPU, and anywhere), ``flex`` and ``flash`` (GPU).

A kernel is planned once a step from an `AttentionLayout` and then called by every layer. No kernel ever builds a mask
over the whole pack. All three give the same result; which one is fastest depends on the machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from echo4o.packed import AttentionLayout, Split

#: (q (n_q, heads, dim), k (n, kv_heads, dim), v (n, kv_heads, dim)) → (n_q, heads, dim); tokens in pack order.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS = ("sdpa", "flex", "flash")


class KernelError(ValueError):
    """An attention kernel that is unknown or cannot run here."""


def resolve_kernel(name: str, device: torch.device | str) -> str:
    """Turn ``auto`` into a kernel and check that `name` can run on `device`.

    Raises:
        KernelError: with the remedy.
    """
    on_gpu = torch.device(device).type == "cuda"
    if name == "auto":
        return "flex" if on_gpu else "sdpa"
    if name not in KERNELS:
        raise KernelError(f"unknown attention kernel {name!r}; choose one of auto, {', '.join(KERNELS)}")
    if name == "flash" and not on_gpu:
        raise KernelError("the flash kernel needs a CUDA device; use --attention_kernel sdpa (or auto) here")
    if name == "flash" and find_varlen_attention() is None:
        raise KernelError(
            "neither flash-attn nor torch's varlen attention is available: pip install 'echo4o[flash]', "
            "or use --attention_kernel flex"
        )
    if name == "flex" and not on_gpu:
        raise KernelError("flex attention has no backward on a CPU; use --attention_kernel sdpa (or auto) here")
    return name


def plan_attention(
    kernel: str, layout: AttentionLayout, device: torch.device | str, selected: Sequence[int] | None = None
) -> Attention:
    """Plan one pack's attention.

    Args:
        selected: indexes into ``layout.splits`` whose queries are wanted (all by default); the rows of q are then
            those splits' tokens, in order, while k and v are the whole pack's.
    """
    splits = layout.splits if selected is None else [layout.splits[i] for i in selected]
    if kernel == "sdpa":
        on_cpu = torch.device(device).type == "cpu"
        return partial(_SplitAttention.apply, splits) if on_cpu else FlashPlan(splits, device, sdpa_varlen)
    if kernel == "flex":
        return partial(flex, block_mask=layout_block_mask(layout, splits, device))
    if kernel == "flash" and (varlen := find_varlen_attention()) is not None:
        return FlashPlan(splits, device, varlen)
    raise KernelError(f"attention kernel {kernel!r} is unknown or not installed; known: {', '.join(KERNELS)}")


# ---------------------------------------------------------------- sdpa: one fused call a split, on views of the pack


def _keys_of(split: Split, x: Tensor) -> Tensor:
    """(n, kv_heads, dim) → (1, kv_heads, n_keys, dim): a view unless an earlier noise split lies between."""
    parts = [x[start:end] for start, end in split.key_ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1).unsqueeze(0)


def _fold(x: Tensor, num_kv_heads: int) -> Tensor:
    """(n, heads, dim) → (1, kv_heads, group · n, dim): query heads sharing a key head become more query rows."""
    n, heads, dim = x.shape
    return x.view(n, num_kv_heads, heads // num_kv_heads, dim).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, dim)


def _unfold(x: Tensor, n: int) -> Tensor:
    """Inverse of `_fold`: (1, kv_heads, group · n, dim) → (n, kv_heads, group, dim), a view."""
    _, kv_heads, _, dim = x.shape
    return x.view(kv_heads, -1, n, dim).permute(2, 0, 1, 3)


def _causal_bias(split: Split, group: int, like: Tensor) -> Tensor | None:
    """Additive (group · n, n_keys) bias aligned bottom-right, for text splits; they are short."""
    if split.mode != "causal" or split.length == 1:
        return None
    bias = torch.full((split.length, split.num_keys), float("-inf"), dtype=like.dtype, device=like.device)
    return bias.triu_(split.num_keys - split.length + 1).repeat(group, 1)


class _SplitAttention(torch.autograd.Function):
    """Flash attention on the CPU, split by split.

    Going through autograd per split would save every split's keys anew and sum their gradients through
    temporaries; here forward keeps q, k, v, the output and its log-sum-exp, and backward adds in place.
    """

    @staticmethod
    def forward(ctx, splits: Sequence[Split], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        out = torch.empty_like(q)
        lse = []
        start = 0
        for split in splits:
            rows = slice(start, start + split.length)
            folded, split_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _fold(q[rows], kv_heads), _keys_of(split, k), _keys_of(split, v),
                attn_mask=_causal_bias(split, heads // kv_heads, q),
            )  # fmt: skip
            out[rows].view(split.length, kv_heads, -1, q.shape[2]).copy_(_unfold(folded, split.length))
            lse.append(split_lse)
            start = rows.stop
        ctx.splits = splits
        ctx.save_for_backward(q, k, v, out, *lse)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, *lse = ctx.saved_tensors
        heads, kv_heads = q.shape[1], k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for split, split_lse in zip(ctx.splits, lse, strict=True):
            rows = slice(start, start + split.length)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _fold(grad_out[rows], kv_heads), _fold(q[rows], kv_heads), _keys_of(split, k), _keys_of(split, v),
                _fold(out[rows], kv_heads), split_lse, 0.0, False,
                attn_mask=_causal_bias(split, heads // kv_heads, q),
            )  # fmt: skip
            grad_q[rows].view(split.length, kv_heads, -1, q.shape[2]).copy_(_unfold(dq, split.length))
            at = 0
            for key_start, key_end in split.key_ranges:
                part = slice(at, at := at + key_end - key_start)
                grad_k[key_start:key_end] += dk[0, :, part].transpose(0, 1)
                grad_v[key_start:key_end] += dv[0, :, part].transpose(0, 1)
            start = rows.stop
        return None, grad_q, grad_k, grad_v


@torch.no_grad()
def attend_ranges(splits: Sequence[Split], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Inference attention on a CPU over keys that lie in several places, without copying any of them.

    Every key range is attended to by itself; the parts are joined by their log-sum-exps. A causal split's last range is
    the split itself.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    out = torch.empty_like(q)
    start = 0
    for split in splits:
        rows = slice(start, start + split.length)
        folded = _fold(q[rows], kv_heads)
        parts = []
        for place, (key_start, key_end) in enumerate(split.key_ranges, start=1):
            bias = None
            if split.mode == "causal" and place == len(split.key_ranges) and split.length > 1:
                hidden = torch.full((split.length, key_end - key_start), float("-inf"), dtype=q.dtype)
                bias = hidden.triu_(key_end - key_start - split.length + 1).repeat(heads // kv_heads, 1)
            keys, values = (x[key_start:key_end].transpose(0, 1).unsqueeze(0) for x in (k, v))
            parts.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(folded, keys, values, attn_mask=bias)
            )
        lse = torch.stack([part[1] for part in parts])
        weights = (lse - lse.logsumexp(dim=0)).exp().unsqueeze(-1).to(q.dtype)
        joined = (weights * torch.stack([part[0] for part in parts])).sum(dim=0) if len(parts) > 1 else parts[0][0]
        out[rows].view(split.length, kv_heads, -1, q.shape[2]).copy_(_unfold(joined.contiguous(), split.length))
        start = rows.stop
    return out


# ---------------------------------------------------------------- flex: one block mask a step, built from lengths

BLOCK_SIZE = 128


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """Flex attention over the whole pack: compiled on GPUs (eager flex would build the full score matrix)."""
    attend = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return attend(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def layout_mask_mod(layout: AttentionLayout, splits: Sequence[Split], device: torch.device | str) -> Callable:
    """The layout as flex attention's ``mask_mod(b, h, q_idx, kv_idx)``; q_idx counts the rows of `splits`."""
    lengths = torch.tensor([split.length for split in layout.splits])

    def of_tokens(values: list) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths).to(device)

    split_id = of_tokens(list(range(len(layout.splits))))
    sample_id = of_tokens([split.sample for split in layout.splits])
    is_causal = of_tokens([split.mode == "causal" for split in layout.splits])
    is_noise = of_tokens([split.mode == "noise" for split in layout.splits])
    position = torch.cat([torch.arange(split.start, split.end) for split in splits]).to(device)

    def mask_mod(b, h, q_idx, kv_idx):
        q_at = position[q_idx]
        same_split = split_id[q_at] == split_id[kv_idx]
        earlier = (kv_idx <= q_at) | (same_split & ~is_causal[q_at])
        visible = same_split | ~is_noise[kv_idx]
        return (sample_id[q_at] == sample_id[kv_idx]) & earlier & visible

    return mask_mod


def count_block_pairs(layout: AttentionLayout, splits: Sequence[Split], block_size: int = BLOCK_SIZE) -> Tensor:
    """Allowed pairs in every (query block, key block): (ceil(n_q / block), ceil(n / block)) int64.

    Sums of rectangles (and, on the diagonal of a text, triangles); nothing of the size of the pack squared.
    """
    num_queries = sum(split.length for split in splits)
    q_edges = torch.arange(0, num_queries + block_size, block_size)
    k_edges = torch.arange(0, layout.num_tokens + block_size, block_size)
    counts = torch.zeros(len(q_edges) - 1, len(k_edges) - 1, dtype=torch.int64)

    def overlap(edges: Tensor, start: int, end: int) -> Tensor:
        return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0)

    at = 0
    for split in splits:
        rows = overlap(q_edges, at, at + split.length)
        for start, end in split.key_ranges:
            counts += rows[:, None] * overlap(k_edges, start, end)[None]
        if split.mode == "causal":
            future = torch.arange(split.length)
            for q_block in rows.nonzero().flatten().tolist():
                first = max(q_block * block_size, at) - at
                hidden = future[first : first + int(rows[q_block])]
                for k_block in overlap(k_edges, split.start, split.end).nonzero().flatten().tolist():
                    low = max(k_block * block_size, split.start) - split.start
                    high = min((k_block + 1) * block_size, split.end) - split.start
                    counts[q_block, k_block] -= (high - (hidden + 1).clamp(min=low)).clamp(min=0).sum()
        at += split.length
    return counts


def layout_block_mask(
    layout: AttentionLayout, splits: Sequence[Split], device: torch.device | str, block_size: int = BLOCK_SIZE
) -> BlockMask:
    """Flex attention's block mask straight from the lengths: which blocks are full, partial or empty."""
    num_queries = sum(split.length for split in splits)
    counts = count_block_pairs(layout, splits, block_size)
    full = counts == block_size * block_size
    partial_blocks = (counts > 0) & ~full

    def as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True)
        counts, order = (x.to(torch.int32)[None, None].to(device) for x in (blocks.sum(dim=1), order))
        return counts, order

    return BlockMask.from_kv_blocks(
        *as_lists(partial_blocks), *as_lists(full), BLOCK_SIZE=block_size,
        mask_mod=layout_mask_mod(layout, splits, device), seq_lengths=(num_queries, layout.num_tokens),
    )  # fmt: skip


# ---------------------------------------------------------------- flash: two variable-length calls a layer

#: (q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal) → out; causal is aligned bottom-right.
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool], Tensor]


def find_varlen_attention() -> VarlenAttention | None:
    """flash-attn's variable-length kernel, else torch's own, else None."""
    if importlib.util.find_spec("flash_attn"):
        return _flash_attn_varlen
    return _torch_varlen if importlib.util.find_spec("torch.nn.attention.varlen") else None


def _flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    try:  # outside of a try block, transformers would demand it of everyone who loads exported code
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise KernelError(
            f"flash-attn is installed but does not import ({error}): build it for this torch, uninstall it, or use "
            "--attention_kernel flex"
        ) from error
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window, gqa = (-1, 0 if causal else -1), q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window, enable_gqa=gqa)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """The same call through `scaled_dot_product_attention`, a segment at a time: for devices without such a kernel."""
    parts = (x.split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
    outs = []
    for segment in zip(*parts, strict=True):
        heads = (x.transpose(0, 1).unsqueeze(0) for x in segment)
        bias = causal_lower_right(len(segment[0]), len(segment[1])) if causal else None
        out = F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


class _VarlenCall:
    """The splits of one kind: their rows of q, their gathered keys, and the lengths."""

    def __init__(self, chosen: list[tuple[Split, int]], causal: bool, device: torch.device | str) -> None:
        self.causal = causal
        self.rows = torch.cat([torch.arange(at, at + split.length) for split, at in chosen]).to(device)
        self.keys = torch.cat([torch.arange(*r) for split, _ in chosen for r in split.key_ranges]).to(device)
        self.cu_q, self.max_q = self._cumulative([split.length for split, _ in chosen], device)
        self.cu_k, self.max_k = self._cumulative([split.num_keys for split, _ in chosen], device)

    @staticmethod
    def _cumulative(lengths: list[int], device: torch.device | str) -> tuple[Tensor, int]:
        cumulative = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        return cumulative.to(device), max(lengths)


class FlashPlan:
    """All text splits in one causal call (bottom-right aligned), all image splits in one bidirectional call.

    Keys are gathered per split: the earlier non-noise splits of its sample, then itself. With grouped-query
    attention keys are a small part of the hidden state, so the copies are cheap beside the attention itself.
    """

    def __init__(self, splits: Sequence[Split], device: torch.device | str, varlen: VarlenAttention) -> None:
        self.varlen = varlen
        starts, at = [], 0
        for split in splits:
            starts.append((split, at))
            at += split.length
        text = [item for item in starts if item[0].mode == "causal"]
        images = [item for item in starts if item[0].mode != "causal"]
        self.calls = [_VarlenCall(items, items is text, device) for items in (text, images) if items]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for call in self.calls:
            part = self.varlen(
                q[call.rows], k[call.keys], v[call.keys], call.cu_q, call.cu_k, call.max_q, call.max_k, call.causal
            )
            out = out.index_copy(0, call.rows, part.to(q.dtype))
        return out
