"""The three attention kernels agree with each other and with the reference model's masks, on any layout."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from echo4o.model import Bagel, attention
from echo4o.model.attention import (
    FlashPlan,
    KernelError,
    count_block_pairs,
    layout_mask_mod,
    plan_attention,
    sdpa_varlen,
)
from echo4o.packed import AttentionLayout

from .reference import ALL_CASES, Reference


@st.composite
def layouts(draw, max_len: int = 12) -> AttentionLayout:
    samples = draw(
        st.lists(
            st.lists(
                st.tuples(st.integers(1, max_len), st.sampled_from(["causal", "full", "noise"])), min_size=1, max_size=6
            ),
            min_size=1,
            max_size=3,
        )
    )
    splits = [split for sample in samples for split in sample]
    return AttentionLayout(
        tuple(sum(length for length, _ in sample) for sample in samples),
        tuple(length for length, _ in splits),
        tuple(mode for _, mode in splits),
    )


def dense_mask(layout: AttentionLayout) -> Tensor:
    """Allowed pairs as a matrix, written from the definition of the modes (not from `Split.key_ranges`)."""
    mask = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    ends = torch.tensor(layout.split_lens).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, layout.split_lens, strict=True)]
    sample_of = torch.arange(len(layout.sample_lens)).repeat_interleave(torch.tensor(layout.sample_lens)).tolist()
    for start, end, mode in zip(starts, ends, layout.attn_modes, strict=True):
        for other, other_end, other_mode in zip(starts, ends, layout.attn_modes, strict=True):
            if sample_of[start] != sample_of[other] or other > start:
                continue
            if other == start:
                block = torch.ones(end - start, end - start, dtype=torch.bool)
                mask[start:end, start:end] = block.tril() if mode == "causal" else block
            elif other_mode != "noise":
                mask[start:end, other:other_end] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def varlen_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, causal):
    """What flash-attn's variable-length call computes: segment by segment, causal aligned bottom-right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.empty_like(q)
    for i in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
        assert num_q <= max_q and num_k <= max_k
        mask = torch.ones(num_q, num_k, dtype=torch.bool)
        out[rows] = dense_attention(q[rows], k[keys], v[keys], mask.tril(num_k - num_q) if causal else mask)
    return out


def random_qkv(num_q: int, num_k: int, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_q * 1009 + num_k)
    shapes = [(num_q, heads), (num_k, kv_heads), (num_k, kv_heads)]
    return [torch.randn(n, h, dim, generator=generator).requires_grad_() for n, h in shapes]


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_kernels_agree_with_the_dense_mask(layout: AttentionLayout, data) -> None:
    """sdpa, flash (through a stand-in for the varlen call) and flex: values, gradients, and any choice of splits."""
    count = len(layout.splits)
    selected = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))) if data.draw(st.booleans()) else None
    splits = layout.splits if selected is None else [layout.splits[i] for i in selected]
    rows = torch.cat([torch.arange(split.start, split.end) for split in splits])
    mask = dense_mask(layout)[rows]
    assert sum(split.num_allowed_pairs for split in splits) == int(mask.sum())

    q, k, v = random_qkv(len(rows), layout.num_tokens)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    expected = dense_attention(q, k, v, mask)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    varlen = [FlashPlan(splits, "cpu", call) for call in (varlen_stand_in, sdpa_varlen)]
    for plan in (plan_attention("sdpa", layout, "cpu", selected), *varlen):
        out = plan(q, k, v)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        for actual, wanted in zip(torch.autograd.grad(out, (q, k, v), grad), expected_grads, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(max_len=40), block_size=st.sampled_from([8, 16, 32]), data=st.data())
def test_block_mask_counts_and_mask_function(layout: AttentionLayout, block_size: int, data) -> None:
    """The block mask is exact: allowed pairs a block equal those of the dense mask, and so does the mask function."""
    chosen = sorted(data.draw(st.sets(st.integers(0, len(layout.splits) - 1), min_size=1)))
    splits = [layout.splits[i] for i in chosen]
    rows = torch.cat([torch.arange(split.start, split.end) for split in splits])
    mask = dense_mask(layout)[rows]
    num_q, num_k = mask.shape
    mask_mod = layout_mask_mod(layout, splits, "cpu")
    assert torch.equal(mask_mod(0, 0, torch.arange(num_q)[:, None], torch.arange(num_k)[None]), mask)
    padded = F.pad(mask, (0, -num_k % block_size, 0, -num_q % block_size))
    blocks = padded.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size)).sum(dim=(1, 3))
    assert torch.equal(count_block_pairs(layout, splits, block_size), blocks)


@pytest.mark.parametrize("name", ["multiref", "mixed"])
def test_flex_forward_on_the_cpu(name: str, parity) -> None:
    """Flex attention itself (eager, forward only) with the block mask built from lengths."""
    layout = Reference(parity / name).batch().layout
    q, k, v = (x.detach() for x in random_qkv(layout.num_tokens, layout.num_tokens, dim=16))
    expected = dense_attention(q, k, v, dense_mask(layout))
    with torch.no_grad():
        out = plan_attention("flex", layout, "cpu")(q, k, v)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        noise = [i for i, split in enumerate(layout.splits) if split.mode == "noise"]
        rows = torch.cat([torch.arange(layout.splits[i].start, layout.splits[i].end) for i in noise])
        out = plan_attention("flex", layout, "cpu", noise)(q[rows], k, v)
        torch.testing.assert_close(out, expected[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL_CASES)
def test_masks_of_the_reference(name: str, parity) -> None:
    case = Reference(parity / name)
    layout = case.batch().layout
    mask = dense_mask(layout)
    positions = torch.arange(layout.num_tokens)
    by_function = layout_mask_mod(layout, layout.splits, "cpu")(0, 0, positions[:, None], positions[None])
    assert torch.equal(by_function, mask)
    start = 0
    for i, length in enumerate(layout.sample_lens):
        if f"attention_mask_{i}" in case.tensors:
            reference = case.tensors[f"attention_mask_{i}"]
            assert torch.equal(mask[start : start + length, start : start + length], reference)
        start += length
    if "flex_attention_mask" in case.tensors:
        n = layout.num_tokens
        assert torch.equal(mask, case.tensors["flex_attention_mask"][:n, :n])


def test_masks_of_random_layouts(parity) -> None:
    """Every (split_lens, attn_modes) pair that the reference recorded."""
    recorded = load_file(parity / "pure" / "pure.safetensors")
    cases = json.loads((parity / "pure" / "pure.json").read_text())["masks"]
    for record in cases:
        total = sum(record["split_lens"])
        layout = AttentionLayout((total,), tuple(record["split_lens"]), tuple(record["attn_modes"]))
        positions = torch.arange(total)
        mask = layout_mask_mod(layout, layout.splits, "cpu")(0, 0, positions[:, None], positions[None])
        assert torch.equal(mask, recorded[record["key"]].bool())
    assert cases


@pytest.mark.parametrize("name", ["multiref", "frames", "extra/dense", "extra/ten_refs"])
def test_model_with_the_flash_decomposition(name: str, parity, monkeypatch) -> None:
    """The whole model through the flash plan gives the reference's hidden states."""
    monkeypatch.setattr(attention, "find_varlen_attention", lambda: varlen_stand_in)
    case = Reference(parity / name)
    model = Bagel.from_pretrained(case.folder)
    model.attention_kernel = model.vit_attention_kernel = "flash"
    out = model(case.batch(), case.latents(), noise=case.noise())
    torch.testing.assert_close(out.last_hidden_state, case.outputs["last_hidden_state"], atol=1e-5, rtol=1e-4)


def test_nothing_of_the_size_of_the_pack_squared_is_built() -> None:
    """Peak memory of planning and running a long pack stays linear: counted by the largest tensor made."""
    lengths = [600, 700, 40, 600] * 8
    layout = AttentionLayout((1940,) * 8, lengths, ["full", "full", "causal", "noise"] * 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    q, k, v = random_qkv(layout.num_tokens, layout.num_tokens)
    with Watch():
        out = plan_attention("sdpa", layout, "cpu")(q, k, v)
        out.sum().backward()
        attention.layout_block_mask(layout, layout.splits, "cpu")
    assert largest <= 2 * q.numel()
    assert largest < layout.num_tokens**2 / 10


@pytest.mark.parametrize(
    ("kernel", "message"), [("xformers", "choose one of"), ("flash", "sdpa"), ("flex", "backward")]
)
def test_unavailable_kernels_name_the_remedy(kernel: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        attention.resolve_kernel(kernel, "cpu")
    assert attention.resolve_kernel("auto", "cpu") == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multiref", "extra/ten_refs"])
def test_compiled_flex_uses_the_block_mask(name: str, parity) -> None:
    """Compiled flex skips the blocks we call empty and masks only those we call partial (forward exists on CPUs)."""
    layout = Reference(parity / name).batch().layout
    q, k, v = (x.detach() for x in random_qkv(layout.num_tokens, layout.num_tokens, dim=16))
    block_mask = attention.layout_block_mask(layout, layout.splits, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(attention.flex_attention, dynamic=False)  # its CPU kernel does not compile dynamic
    with torch.no_grad():
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(*heads, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out, dense_attention(q, k, v, dense_mask(layout)), atol=1e-5, rtol=1e-4)
