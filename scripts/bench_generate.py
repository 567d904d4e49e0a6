"""Time the drawing of one picture against straightforward implementations on the same weights.

    python scripts/bench_generate.py                        # 2 references, 256 × 256, 10 steps, both guidances
    python scripts/bench_generate.py --references 3 --runs 5
    python scripts/bench_generate.py --memory               # bytes of keys and values for 1 … 8 references
    python scripts/bench_generate.py --model data_examples/tiny_bagel   # only the batch, with a model of files

All run in the same process, in turn; the medians are compared and the results have to agree.

ours      contexts that share rows of one key/value pool; all guidance branches of a step in one forward pass
rebuild   the three contexts read anew in every step, the branches one after the other
upstream  the reference model's way: three contexts with caches of their own, read once and deeply copied; in every
          layer of every step keys and values of context and picture are put together anew; branches one after the
          other, experts by gather and scatter
batch     ours, several equal requests in one call, against the same number of calls

The autoencoder is a small one (encoding its references costs all programs the same), and decoding is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from bench_step import build_model
from PIL import Image
from torch import Tensor

from echo4o.data.images import to_tensor
from echo4o.data.positions import patchify_image, position_ids
from echo4o.generate.context import KVPool
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.sampler import shifted_schedule
from echo4o.model.attention import plan_attention
from echo4o.model.config import VAEConfig
from echo4o.model.embeddings import patchify_latents
from echo4o.model.mot import apply_rope, rope_tables
from echo4o.model.vae import AutoEncoder
from echo4o.packed import AttentionLayout

MARKERS = {"bos_token_id": 4000, "eos_token_id": 4003, "start_of_image": 4001, "end_of_image": 4002}


class Bytes:
    """A tokenizer that is there without files: a number a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i % 256 for i in ids).decode(errors="replace")


# ---------------------------------------------------------------- the straightforward way, on the same modules


class NaiveContext:
    """Keys and values of every layer, and the next position."""

    def __init__(self, layers: int) -> None:
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.rope = 0


class Naive:
    def __init__(self, pipe: Echo4oPipeline, rebuild: bool) -> None:
        self.pipe, self.model, self.llm, self.rebuild = pipe, pipe.model, pipe.model.language_model.model, rebuild

    def text(self, context: NaiveContext, text: str) -> None:
        ids = [MARKERS["bos_token_id"], *self.pipe.tokenizer.encode(text), MARKERS["eos_token_id"]]
        x = self.llm.embed_tokens(torch.tensor(ids))
        positions = context.rope + torch.arange(len(ids))
        self.layers(context, x, positions, torch.arange(len(ids)), torch.arange(0), causal=True, keep=True)
        context.rope += len(ids)

    def image(self, context: NaiveContext, features: Tensor, gen: bool) -> None:
        self.framed(context, features, gen, keep=True)
        context.rope += 1

    def framed(self, context: NaiveContext, features: Tensor, gen: bool, keep: bool) -> Tensor:
        """An image's tokens between its markers through all layers; its hidden states."""
        markers = self.llm.embed_tokens(torch.tensor([MARKERS["start_of_image"], MARKERS["end_of_image"]]))
        n = len(features)
        x = torch.zeros(n + 2, features.shape[1])
        x[1:-1], x[0], x[-1] = features, markers[0], markers[1]
        inside, frame = torch.arange(1, n + 1), torch.tensor([0, n + 1])
        und, gen_at = (frame, inside) if gen else (torch.arange(n + 2), torch.arange(0))
        return self.layers(context, x, torch.full((n + 2,), context.rope), und, gen_at, causal=False, keep=keep)

    def layers(
        self, context: NaiveContext, x: Tensor, positions: Tensor, und: Tensor, gen: Tensor, causal: bool, keep: bool
    ) -> Tensor:
        config = self.model.config.llm
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, x.dtype)

        def routed(x: Tensor, module, module_gen) -> Tensor:
            first = module(x[und])
            out = first.new_zeros(len(x), *first.shape[1:])
            out[und], out[gen] = first, module_gen(x[gen])
            return out

        for number, layer in enumerate(self.llm.layers):
            attn, rows = layer.self_attn, len(x)
            normed = routed(x, layer.input_layernorm, layer.input_layernorm_moe_gen)
            q, k, v = (
                routed(normed, getattr(attn, f"{n}_proj"), getattr(attn, f"{n}_proj_moe_gen")).view(
                    rows, -1, config.head_dim
                )
                for n in "qkv"
            )
            q = apply_rope(routed(q, attn.q_norm, attn.q_norm_moe_gen), cos, sin)
            k = apply_rope(routed(k, attn.k_norm, attn.k_norm_moe_gen), cos, sin)
            if (past := context.cache[number]) is not None:
                k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
            if keep:
                context.cache[number] = (k, v)
            mask = torch.ones(rows, len(k), dtype=torch.bool).tril(len(k) - rows)[None, None] if causal else None
            heads = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
            x = x + routed(out[0].transpose(0, 1).reshape(rows, -1), attn.o_proj, attn.o_proj_moe_gen)
            normed = routed(x, layer.post_attention_layernorm, layer.post_attention_layernorm_moe_gen)
            x = x + routed(normed, layer.mlp, layer.mlp_moe_gen)
        return routed(x, self.llm.norm, self.llm.norm_moe_gen)

    def latents(self, tokens: Tensor, grid: tuple[int, int], t: float) -> Tensor:
        model, side = self.model, self.model.config.max_latent_size
        where = position_ids(grid[0] * 16, grid[1] * 16, 16, side, model.config.interpolate_pos)
        return model.vae2llm(tokens) + model.time_embedder(torch.tensor([t])) + model.latent_pos_embed(where)

    @torch.no_grad()
    def __call__(self, prompt: str, images: list[Image.Image], seed: int, num_timesteps: int, **settings) -> Tensor:
        """Latent tokens (h · w, p·p·C) of the picture."""
        model, pipe, request = self.model, self.pipe, self.pipe.request([prompt], "multi_ref", **settings)
        generator = torch.Generator().manual_seed(seed)
        elements, grid = [], (0, 0)
        for image in images:
            image = image.resize(pipe.vae_transform.target_size(*image.size), Image.Resampling.BICUBIC)
            moments = pipe.vae.moments(to_tensor(image, image.size)[None])
            latent = pipe.vae.sample(moments, generator=generator)[0]
            grid = (latent.shape[1] // 2, latent.shape[2] // 2)
            pixels = pipe.vit_transform(image)
            where = position_ids(*pixels.shape[1:], 14, model.config.vit_max_num_patch_per_side, False)
            layout = AttentionLayout([len(where)], [len(where)], ["full"])
            attend = plan_attention("sdpa", layout, model.device)
            seen = model.connector(model.vit_model(patchify_image(pixels, 14), where, attend))
            elements.append((self.latents(patchify_latents([latent], 2), grid, 0.0), seen + model.vit_pos_embed(where)))
        x = torch.randn(grid[0] * grid[1], model.config.latent_dim, generator=generator)
        times = shifted_schedule(num_timesteps, request.settings.timestep_shift)
        contexts = self.read(prompt, elements)
        for number, (t, t_next) in enumerate(pairwise(times)):
            if self.rebuild and number:
                contexts = self.read(prompt, elements)
            features = self.latents(x, grid, float(t))
            branches = [
                model.llm2vae(self.framed(context, features, gen=True, keep=False)[1:-1]) for context in contexts
            ]
            x = x - request.settings.guidance.combine(float(t), *branches) * (t - t_next)
        return x

    def read(self, prompt: str, elements: list[tuple[Tensor, Tensor]]) -> tuple[NaiveContext, ...]:
        """The full context, the one without text and the one without images."""
        full, no_text, no_image = (NaiveContext(len(self.llm.layers)) for _ in range(3))
        for latents, seen in elements:
            self.image(full, latents, gen=True)
            self.image(full, seen, gen=False)
            no_text = copy.deepcopy(full)
        self.text(full, prompt)
        self.text(no_image, prompt)
        return full, no_text, no_image


# ---------------------------------------------------------------- measuring


def build_pipeline(hidden: int, layers: int) -> Echo4oPipeline:
    model = build_model(hidden, layers)
    vae = AutoEncoder(VAEConfig(ch=32)).eval()
    return Echo4oPipeline(model, vae, Bytes(), MARKERS, (256, 256, 16), (252, 224, 14))


def references(number: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(number)]


def in_turn(programs: dict, runs: int) -> dict[str, list[float]]:
    """Seconds of each program, once through all of them before the next round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(runs + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return (
        f"{slow} {medians[slow]:.2f} s, {fast} {medians[fast]:.2f} s: {statistics.median(ratios):.2f}× "
        f"(pairs {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


def report_memory(pipe: Echo4oPipeline) -> None:
    """Keys and values of 1 … 8 references of 256 × 256, against the formula."""
    llm = pipe.model.config.llm
    row = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * 4
    pools: list[KVPool] = []
    init = KVPool.__init__

    def watch(self, *arguments) -> None:
        init(self, *arguments)
        pools.append(self)

    KVPool.__init__ = watch
    print(f"a row of keys and values: 2 · {llm.num_hidden_layers} layers · {llm.num_key_value_heads} heads · ", end="")
    print(
        f"{llm.head_dim} · 4 bytes = {row:,} bytes; a reference: (16² + 2) + (18² + 2) rows = {584 * row / 1e6:.2f} MB"
    )
    last = 0
    for number in (1, 2, 3, 4, 6, 8):
        pipe("Put them together.", references(number), num_timesteps=2, preset="multi_ref")
        pool = pools[-1]
        print(f"{number} references: {pool.capacity:,} rows, {pool.num_bytes / 1e6:.2f} MB", end="")
        print(f" (+{(pool.num_bytes - last) / 1e6:.2f})" if last else "")
        last = pool.num_bytes
    KVPool.__init__ = init


def call_of(images: list[Image.Image], steps: int) -> dict:
    text = "Put the person of image 1 into the street of image 2."
    guided = {"cfg_text_scale": 4.0, "cfg_img_scale": 2.0}
    return {"prompt": text, "images": images, "num_timesteps": steps + 1, **guided}


def compare_batch(pipe: Echo4oPipeline, call: dict, number: int, runs: int) -> dict[str, list[float]]:
    """Equal requests but for their seeds, in one call and in a call each."""
    requests = [pipe.prompt_request(preset="multi_ref", seed=seed, **call) for seed in range(number)]
    together = pipe.batch(requests).info
    apart = max(
        (pipe.batch([request]).info[0]["latents"] - info["latents"]).abs().max().item()
        for request, info in zip(requests, together, strict=True)
    )
    print(f"{number} requests: latents of the batch and of single calls differ by at most {apart:.1e}")
    name = f"{number} calls"
    programs = {name: lambda: [pipe.batch([r]) for r in requests], "batch": lambda: pipe.batch(requests)}
    seconds = in_turn(programs, runs)
    print(compare(seconds, name, "batch"))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="requests of the batched run")
    parser.add_argument("--memory", action="store_true", help="only report keys and values by number of references")
    parser.add_argument("--model", help="only compare the batch, on this model, with references of 64 × 64")
    parser.add_argument("--json", help="file for the seconds of every run")
    arguments = parser.parse_args()
    if arguments.model:
        pipe = Echo4oPipeline.from_pretrained(arguments.model, dtype="float32", device="cpu")
        images = [image.resize((64, 64)) for image in references(arguments.references)]
        compare_batch(pipe, call_of(images, arguments.steps), arguments.batch, arguments.runs)
        return
    pipe = build_pipeline(arguments.hidden, arguments.layers)
    if arguments.memory:
        return report_memory(pipe)
    call = call_of(references(arguments.references), arguments.steps)
    programs = {"rebuild": Naive(pipe, rebuild=True), "upstream": Naive(pipe, rebuild=False)}
    pipe._decoded = lambda state: Image.new("RGB", (1, 1))  # decoding is the same for all and left out
    request = pipe.prompt_request(preset="multi_ref", seed=0, **call)

    ours = pipe.batch([request]).info[0]["latents"]
    print(f"{arguments.references} references, {arguments.steps} steps, {torch.get_num_threads()} threads")
    for name, program in programs.items():
        apart = ((program(seed=0, **call) - ours).norm() / ours.norm()).item()
        print(f"latents of {name} and ours differ by {apart:.1e} (relative)")
        if apart > 1e-3:
            raise SystemExit("the implementations disagree: the comparison would mean nothing")
    calls = {name: partial(program, seed=0, **call) for name, program in programs.items()}
    seconds = in_turn({**calls, "ours": lambda: pipe.batch([request])}, arguments.runs)
    for name in programs:
        print(compare(seconds, name, "ours"), flush=True)
    seconds |= compare_batch(pipe, call, arguments.batch, arguments.runs)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(seconds, file, indent=2)


if __name__ == "__main__":
    main()
