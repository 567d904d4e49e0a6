"""Time one training step (forward + backward) against its necessary work and against the upstream way of computing it.

    python scripts/bench_step.py                  # hidden 512 × 6 layers, 2 samples × 3 references = 4,104 tokens
    python scripts/bench_step.py --runs 7 --json step.json

Four programs run in turn, each in a process of its own (peak memory is the process'):

ours        this project's step
recompute   the same with --activation_checkpointing full: less memory for a second forward pass
upstream    the reference model's way on the same weights: a dozen gathers and scatters a layer, one bool mask a sample
            passed as 3-D, which pushes CPU attention onto the math path
upstream4d  the same with the mask passed as 4-D: the fair baseline

Necessary work counts multiply-adds as two operations, attention over allowed pairs only, backward as twice forward. The
peak is the best float32 matmul measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from echo4o.model import Bagel, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from echo4o.model.embeddings import shift_time
from echo4o.model.mot import apply_rope, rope_tables
from echo4o.packed import AttentionLayout, PackedBatch
from echo4o.train.parallelize import apply_activation_checkpointing

PROGRAMS = ("ours", "recompute", "upstream4d", "upstream")


def build_model(hidden: int, layers: int) -> Bagel:
    config = BagelConfig(
        llm=LLMConfig(
            hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), vocab_size=4096,
            rms_norm_eps=1e-6, rope_theta=1e6, layer_module="Qwen2MoTDecoderLayer", qk_norm=True,
            tie_word_embeddings=False,
        ),
        vit=ViTConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=4,
            image_size=420, patch_size=14,
        ),
        vae=VAEConfig(),
        max_latent_size=32,
        vit_max_num_patch_per_side=30,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Bagel(config)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    return model


def build_batch(num_samples: int, num_refs: int, num_words: int) -> tuple[PackedBatch, Tensor, Tensor]:
    """`num_samples` multi-reference samples of 256 × 256 images: (VAE 16², ViT 18²) a reference, text, target."""
    generator = torch.Generator().manual_seed(0)
    texts, vits, vaes, positions, text_ids, timesteps, mse = [], [], [], [], [], [], []
    split_lens, modes, sample_lens = [], [], []
    at = 0
    for _ in range(num_samples):
        start, rope = at, 0
        plan = [("vae", 256), ("vit", 324)] * num_refs + [("text", num_words), ("target", 256)]
        for kind, tokens in plan:
            length = tokens + 2
            if kind == "text":
                texts += range(at, at + length)
                text_ids += torch.randint(0, 4000, (length,), generator=generator).tolist()
                positions += range(rope, rope + length)
                rope += length
            else:
                texts += [at, at + length - 1]
                text_ids += [4001, 4002]
                (vits if kind == "vit" else vaes).extend(range(at + 1, at + 1 + tokens))
                positions += [rope] * length
                rope += kind != "target"
                if kind != "vit":
                    timesteps += [0.3 if kind == "target" else float("-inf")] * tokens
                if kind == "target":
                    mse += range(at + 1, at + 1 + tokens)
            split_lens.append(length)
            modes.append({"text": "causal", "target": "noise"}.get(kind, "full"))
            at += length
        sample_lens.append(at - start)
    num_images = num_samples * num_refs
    grid = torch.arange(16)[:, None] * 32 + torch.arange(16)
    vit_grid = torch.arange(18)[:, None] * 30 + torch.arange(18)
    batch = PackedBatch(
        sequence_length=at, sample_lens=sample_lens, split_lens=split_lens, attn_modes=modes,
        packed_text_ids=torch.tensor(text_ids), packed_text_indexes=torch.tensor(texts),
        packed_position_ids=torch.tensor(positions), packed_vit_token_indexes=torch.tensor(vits),
        packed_vit_tokens=torch.randn(num_images * 324, 588, generator=generator),
        packed_vit_position_ids=vit_grid.flatten().repeat(num_images), vit_token_seqlens=[324] * num_images,
        patchified_vae_latent_shapes=[(16, 16)] * (num_images + num_samples),
        packed_latent_position_ids=grid.flatten().repeat(num_images + num_samples),
        packed_vae_token_indexes=torch.tensor(vaes),
        packed_timesteps=torch.tensor(timesteps), mse_loss_indexes=torch.tensor(mse),
    )  # fmt: skip
    batch.validate()
    latents = torch.randn(len(vaes), 64, generator=generator)
    return batch, latents, torch.randn(len(vaes), 64, generator=generator)


def count_work(model: Bagel, batch: PackedBatch) -> dict[str, float]:
    """Floating-point operations of one forward and backward, by part."""
    llm, vit = model.config.llm, model.config.vit
    tokens, num_vit = batch.sequence_length, len(batch.packed_vit_tokens)
    kv_dim = llm.num_key_value_heads * llm.head_dim
    per_token = llm.hidden_size * (2 * llm.hidden_size + 2 * kv_dim + 3 * llm.intermediate_size)
    vit_pairs = sum(n * n for n in batch.vit_token_seqlens)
    vit_per_token = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    connector = num_vit * llm.hidden_size * (vit.hidden_size + llm.hidden_size)
    vae_dim = model.config.latent_dim
    heads = len(batch.packed_timesteps) * vae_dim * llm.hidden_size + batch.num_mse_tokens * vae_dim * llm.hidden_size
    forward = {
        "llm linear": 2 * tokens * per_token * llm.num_hidden_layers,
        "llm attention": 4 * batch.layout.num_allowed_pairs * llm.hidden_size * llm.num_hidden_layers,
        "vit": model.config.num_vit_layers * (2 * num_vit * vit_per_token + 4 * vit_pairs * vit.hidden_size)
        + 2 * num_vit * 588 * vit.hidden_size,
        "connector and heads": 2 * (connector + heads),
    }
    return {name: 3.0 * value for name, value in forward.items()}


# ---------------------------------------------------------------- the upstream way, on the same weights


def sample_masks(layout: AttentionLayout) -> list[Tensor]:
    masks = []
    starts = [0, *torch.tensor(layout.sample_lens).cumsum(0).tolist()]
    for sample, (start, end) in enumerate(pairwise(starts)):
        mask = torch.zeros(end - start, end - start, dtype=torch.bool)
        for split in (s for s in layout.splits if s.sample == sample):
            for key_start, key_end in split.key_ranges:
                mask[split.start - start : split.end - start, key_start - start : key_end - start] = True
            if split.mode == "causal":
                own = slice(split.start - start, split.end - start)
                mask[own, own] = torch.ones(split.length, split.length, dtype=torch.bool).tril()
        masks.append(mask)
    return masks


def upstream_forward(
    model: Bagel, batch: PackedBatch, latents: Tensor, noise: Tensor, masks: list[Tensor], as_4d: bool
) -> Tensor:
    """Per-token velocity error as the reference computes it: index assignments everywhere, all rows of all layers."""
    llm = model.language_model.model
    und_at = torch.cat([batch.packed_text_indexes, batch.packed_vit_token_indexes])
    gen_at = batch.packed_vae_token_indexes
    x = latents.new_zeros(batch.sequence_length, model.config.llm.hidden_size)
    x[batch.packed_text_indexes] = llm.embed_tokens(batch.packed_text_ids)
    x[batch.packed_vit_token_indexes] = model._vit_tokens(batch, x)
    t = shift_time(batch.packed_timesteps, 1.0)
    mixed = (1 - t[:, None]) * latents + t[:, None] * noise
    x[gen_at] = model.vae2llm(mixed) + model.time_embedder(t) + model.latent_pos_embed(batch.packed_latent_position_ids)
    cos, sin = rope_tables(batch.packed_position_ids, model.config.llm.head_dim, model.config.llm.rope_theta, x.dtype)

    def by_expert(module, suffix_module, x: Tensor, width: int) -> Tensor:
        out = x.new_zeros(x.shape[0], width)
        out[und_at] = module(x[und_at])
        out[gen_at] = suffix_module(x[gen_at])
        return out

    for layer in llm.layers:
        attn, dim = layer.self_attn, x.shape[1]
        h = by_expert(layer.input_layernorm, layer.input_layernorm_moe_gen, x, dim)
        heads = {}
        for name in ("q", "k", "v"):
            und, gen = getattr(attn, f"{name}_proj"), getattr(attn, f"{name}_proj_moe_gen")
            states = by_expert(und, gen, h, und.out_features).view(x.shape[0], -1, attn.head_dim)
            if name != "v":
                normed = torch.zeros_like(states)
                normed[und_at] = getattr(attn, f"{name}_norm")(states[und_at])
                normed[gen_at] = getattr(attn, f"{name}_norm_moe_gen")(states[gen_at])
                states = apply_rope(normed, cos, sin)
            heads[name] = states.transpose(0, 1)
        group = heads["q"].shape[0] // heads["k"].shape[0]
        heads |= {name: heads[name].repeat_interleave(group, dim=0) for name in ("k", "v")}
        outs = []
        for q, k, v, mask in zip(*(heads[n].split(batch.sample_lens, dim=1) for n in "qkv"), masks, strict=True):
            mask = mask[None, None] if as_4d else mask[None]
            outs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0])
        attended = torch.cat(outs, dim=1).transpose(0, 1).reshape(x.shape[0], -1)
        x = x + by_expert(attn.o_proj, attn.o_proj_moe_gen, attended, dim)
        out = torch.zeros_like(x)
        out[und_at] = layer.mlp(layer.post_attention_layernorm(x[und_at]))
        out[gen_at] = layer.mlp_moe_gen(layer.post_attention_layernorm_moe_gen(x[gen_at]))
        x = x + out
    hidden = by_expert(llm.norm, llm.norm_moe_gen, x, x.shape[1])
    return (model.llm2vae(hidden[batch.mse_loss_indexes]) - (noise - latents)[t > 0]) ** 2


# ---------------------------------------------------------------- measuring


def matmul_peak() -> float:
    """Best float32 GFLOP/s of a few large products."""
    a, b = torch.randn(4096, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * 4096 * 1024**2 / (time.perf_counter() - start) / 1e9)
    return best


def measure(program: str, args: argparse.Namespace) -> dict:
    model = build_model(args.hidden, args.layers)
    batch, latents, noise = build_batch(args.samples, args.refs, num_words=40)
    is_ours = program in ("ours", "recompute")
    masks = [] if is_ours else sample_masks(batch.layout)
    if program == "recompute":
        apply_activation_checkpointing(model, "full")

    def loss() -> Tensor:
        if is_ours:
            mse = model(batch, latents, noise, return_hidden=False).mse
        else:
            mse = upstream_forward(model, batch, latents, noise, masks, as_4d=program == "upstream4d")
        return mse.mean(-1).sum() / batch.num_mse_tokens

    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        value = loss()
        value.backward()
        seconds.append(time.perf_counter() - start)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = count_work(model, batch)
    return {
        "program": program, "seconds": min(seconds[1:]), "peak_gflops": matmul_peak(),
        "loss": value.item(), "grad_norm": norm,
        "tokens": batch.sequence_length, "work_gflop": {name: v / 1e9 for name, v in work.items()},
        "max_rss_mb": memory / 1024, "rss_over_start_mb": (memory - start_memory) / 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def report(results: dict[str, list[dict]]) -> None:
    """Medians of the interleaved runs, and the ratios pair by pair."""
    ours = next(iter(results.values()))
    first, total = ours[0], sum(ours[0]["work_gflop"].values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in first["work_gflop"].items())
    print(f"{first['parameters'] / 1e6:.1f} M parameters, {first['tokens']} tokens; {total:.0f} GFLOP ({parts})")
    columns = ("program", "s/step", "tok/s", "GFLOP/s", "peak", "share", "max RSS MB", "loss", "grad norm")
    print("".join(f"{name:>11}" for name in columns))
    for program, runs in results.items():
        seconds, peak, memory = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "peak_gflops", "max_rss_mb")
        )
        share = statistics.median(total / run["seconds"] / run["peak_gflops"] for run in runs)
        figures = (f"{seconds:.2f}", f"{first['tokens'] / seconds:.0f}", f"{total / seconds:.0f}", f"{peak:.0f}")
        losses = (f"{runs[0]['loss']:.5f}", f"{runs[0]['grad_norm']:.5f}")
        print("".join(f"{text:>11}" for text in (program, *figures, f"{share:.0%}", f"{memory:.0f}", *losses)))
    for program, runs in list(results.items())[1:]:
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, runs, strict=True)]
        pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{first['program']} is {statistics.median(ratios):.2f}× as fast as {program} (pairs: {pairs})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs of each program")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a run, after one warm-up step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--refs", type=int, default=3)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--json", help="also write all figures to this file")
    parser.add_argument("--one", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return

    shape = [f"--{name}={getattr(args, name)}" for name in ("steps", "hidden", "layers", "samples", "refs")]
    results: dict[str, list[dict]] = {program: [] for program in args.programs}
    for run in range(args.runs):
        for program in args.programs:
            command = [sys.executable, __file__, f"--one={program}", *shape]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results[program].append(answer)
            print(f"run {run + 1}/{args.runs} {program}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
    report(results)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
