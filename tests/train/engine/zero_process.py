"""DeepSpeed runs of a tiny BAGEL in processes of their own: ``python -m tests.train.engine.zero_process FOLDER NAME…``.

One start of processes runs several scenarios one after the other; rank 0 writes what each of them found to
``FOLDER/NAME.pt``. The same steps as a plain loop in one process are `plain_steps`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echo4o.checkpoint.pieces import Piece
from echo4o.model import Bagel, bagel
from echo4o.packed import PackedBatch
from echo4o.train.engine.single import SLOTS
from echo4o.train.losses import StepTotals, micro_loss
from echo4o.train.optim import build_optimizer, freeze
from tests.train.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[3]
LR, MAX_NORM = 1e-2, 1.0
#: Each step's packs, dealt to the ranks in turn: unequal in length, some without images, without loss, or without text.
PACKS = (
    ("reference", "vit", "text", "target"),
    ("text", "text"),
    ("target",),
    ("vit", "text", "reference", "text", "target", "text"),
)
TOKENS = {"reference": 4, "vit": 4, "text": 7, "target": 9}


@dataclass(frozen=True)
class Scenario:
    """What a run does.

    Attributes:
        stage, dtype, cpu_offload, reduce_dtype: of the engine.
        tied: one table of word embeddings.
        recompute: activation checkpointing.
        values: the model has its values when it is prepared; otherwise they are read, as in a training.
        steps: to be made, from `first` on.
        resume: file in the folder whose ``state``, of two steps, is loaded.
        poisoned: a step whose gradients are not finite comes in between.
        ce_chunk: rows that the cross-entropy head takes at once.
        zero: settings of DeepSpeed's file.
    """

    stage: int = 3
    dtype: str = "float32"
    reduce_dtype: str = "float32"
    cpu_offload: bool = False
    tied: bool = False
    recompute: str = "none"
    values: bool = False
    first: int = 0
    steps: int = 3
    resume: str | None = None
    poisoned: bool = False
    ce_chunk: int = 1024
    zero: Mapping[str, Any] = field(default_factory=dict)


#: What a large model does and a tiny one does not: weights are given back, buckets and groups are full.
LARGE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 3000,
    "sub_group_size": 5000,
    "reduce_bucket_size": 1500,
    "allgather_bucket_size": 4000,
}
SCENARIOS = {
    "zero1": Scenario(1, poisoned=True),
    "zero2": Scenario(2, poisoned=True, zero=LARGE),
    "zero3": Scenario(3, poisoned=True, zero=LARGE),
    "zero3_from_plain": Scenario(3, first=2, steps=1, resume="plain.pt", zero=LARGE),
    "zero1_from_plain": Scenario(1, first=2, steps=1, resume="plain.pt"),
    "zero2_from_zero3": Scenario(2, first=2, steps=1, resume="zero3.pt"),
    "zero3_from_zero2": Scenario(3, first=2, steps=1, resume="zero2.pt"),
    "zero1_large": Scenario(1, poisoned=True, zero=LARGE),
    "zero2_small": Scenario(2, poisoned=True),
    "zero3_small": Scenario(3, poisoned=True, recompute="full"),
    **{f"zero{stage}_values": Scenario(stage, values=True) for stage in (1, 2, 3)},
    **{f"zero{stage}_tied": Scenario(stage, tied=True, zero=LARGE) for stage in (1, 2, 3)},
    **{f"zero{stage}_offload": Scenario(stage, cpu_offload=True, poisoned=True) for stage in (1, 2, 3)},
    **{f"zero{stage}_large_offload": Scenario(stage, cpu_offload=True, zero=LARGE) for stage in (1, 2, 3)},
    **{f"zero3_{mode}": Scenario(3, recompute=mode, zero=LARGE) for mode in ("full", "selective")},
    "zero3_chunks": Scenario(3, ce_chunk=4, zero=LARGE),
    **{f"zero{stage}_bf16": Scenario(stage, dtype="bfloat16", poisoned=True, zero=LARGE) for stage in (1, 2, 3)},
    **{f"zero{stage}_bf16_values": Scenario(stage, dtype="bfloat16", values=True) for stage in (1, 2, 3)},
    "zero3_bf16_reduce": Scenario(3, dtype="bfloat16", reduce_dtype="bfloat16", recompute="selective"),
}


def pack_of(kinds: tuple[str, ...], seed: int) -> tuple[PackedBatch, Tensor, Tensor]:
    """A pack of one sample, its latents and its noise. A text is learned, a target is denoised."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, list[int]] = {name: [] for name in ("texts", "ids", "vits", "vaes", "rope", "mse", "ce")}
    timesteps: list[float] = []
    at = 0
    for place, kind in enumerate(kinds):
        length = TOKENS[kind] + seed % 3 * (kind == "text") + 2 * (kind != "text")
        fields["rope"] += range(place, place + length) if kind == "text" else [place] * length
        inner = list(range(at + 1, at + length - 1))
        if kind == "text":
            fields["texts"] += range(at, at + length)
            fields["ce"] += range(at, at + length - 1)
        else:
            fields["texts"] += [at, at + length - 1]
            fields["vits" if kind == "vit" else "vaes"] += inner
            timesteps += [] if kind == "vit" else [0.3 if kind == "target" else float("-inf")] * len(inner)
            fields["mse"] += inner if kind == "target" else []
        at += length
    lengths = [TOKENS[kind] + seed % 3 * (kind == "text") + 2 * (kind != "text") for kind in kinds]
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in fields.items()}
    num_vit, num_vae = len(fields["vits"]), len(fields["vaes"])
    sides = {"reference": (2, 2), "target": (3, 3)}
    images: dict[str, Any] = {}
    if num_vit:
        images |= {
            "packed_vit_tokens": torch.randn(num_vit, 588, generator=generator),
            "packed_vit_token_indexes": tensors["vits"],
            "packed_vit_position_ids": torch.tensor([0, 1, 4, 5]).repeat(num_vit // 4),
            "vit_token_seqlens": [4] * (num_vit // 4),
        }
    if num_vae:
        grids = [sides[kind] for kind in kinds if kind in sides]
        images |= {
            "patchified_vae_latent_shapes": grids,
            "packed_latent_position_ids": torch.cat(
                [(torch.arange(h)[:, None] * 8 + torch.arange(w)).flatten() for h, w in grids]
            ),
            "packed_vae_token_indexes": tensors["vaes"],
            "packed_timesteps": torch.tensor(timesteps),
        }
    batch = PackedBatch(
        sequence_length=at,
        sample_lens=[at],
        split_lens=lengths,
        attn_modes=[{"text": "causal", "target": "noise"}.get(kind, "full") for kind in kinds],
        packed_text_ids=torch.randint(0, 250, (len(fields["texts"]),), generator=generator),
        packed_text_indexes=tensors["texts"],
        packed_position_ids=tensors["rope"],
        mse_loss_indexes=tensors["mse"] if fields["mse"] else None,
        ce_loss_indexes=tensors["ce"] if fields["ce"] else None,
        packed_label_ids=torch.randint(0, 250, (len(fields["ce"]),), generator=generator) if fields["ce"] else None,
        **images,
    )
    latents = torch.randn(num_vae, 64, generator=generator)
    return batch, latents, torch.randn(num_vae, 64, generator=generator)


def packs_of_step(step: int) -> list[tuple[PackedBatch, Tensor, Tensor]]:
    return [pack_of(kinds, seed=10 * step + number) for number, kinds in enumerate(PACKS)]


def tiny_weights(tied: bool = False) -> dict[str, Tensor]:
    """A model's state dict, the same on every call."""
    config = tiny_config()
    config = replace(config, llm=replace(config.llm, tie_word_embeddings=tied))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Bagel(config)
        nn.init.normal_(model.llm2vae.weight, std=0.02)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tiny_model(tied: bool, weights: Mapping[str, Tensor] | None) -> Bagel:
    """With its values, or on the meta device; one of its norms is frozen beside the tables."""
    config = tiny_config()
    config = replace(config, llm=replace(config.llm, tie_word_embeddings=tied))
    with torch.device("cpu" if weights else "meta"):
        model = Bagel(config)
    if weights:
        model.load_state_dict(dict(weights))
    freeze(model)
    model.language_model.model.norm.weight.requires_grad_(False)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return build_optimizer(model, lr=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def loss_of(model: nn.Module, pack: tuple[PackedBatch, Tensor, Tensor], totals: StepTotals) -> Tensor:
    batch, latents, noise = pack
    output = model(batch, latents if len(latents) else None, noise if len(latents) else None, return_hidden=False)
    total = micro_loss(output.mse, output.ce, batch, totals).total
    assert total is not None
    return total


def totals_of(packs: list[tuple[PackedBatch, Tensor, Tensor]]) -> StepTotals:
    return StepTotals(*StepTotals.local([batch for batch, _, _ in packs], False).tolist())


# ---------------------------------------------------------------- one process, without an engine


def plain_steps(num_steps: int = 3, tied: bool = False) -> dict[str, Any]:
    """All packs of each step in one process: losses, norms, weights, and the state after two of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes: their number changes the last bits
    try:
        return _plain_steps(num_steps, tied)
    finally:
        torch.set_num_threads(threads)


def _plain_steps(num_steps: int, tied: bool) -> dict[str, Any]:
    model = tiny_model(tied, tiny_weights(tied))
    optimizer = adamw(model)
    losses, norms, short = [], [], None
    for step in range(num_steps):
        packs = packs_of_step(step)
        totals = totals_of(packs)
        parts = [loss_of(model, pack, totals) for pack in packs]
        torch.stack(parts).sum().backward()
        losses.append(float(sum(part.detach() for part in parts)))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            short = _plain_state(model, optimizer)
    return {"losses": losses, "norms": norms, "weights": weights_of(model), "state": short}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor once, by its first name."""
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _plain_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slots = {f"{name}.{slot}": optimizer.state[p][slot].clone() for name, p in named.items() for slot in SLOTS}
    steps = {name: int(optimizer.state[p]["step"]) for name, p in named.items()}
    return {"trained": {name: p.detach().clone() for name, p in named.items()}, "slots": slots, "steps": steps}


# ---------------------------------------------------------------- processes with an engine


def run_zero(folder: Path, names: list[str], world_size: int, timeout: float = 300.0) -> dict[str, dict[str, Any]]:
    """Run scenarios in `world_size` new processes and wait for their end; what rank 0 found, by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, "-m", "tests.train.engine.zero_process", str(folder), *names]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(world_size):
            log = stack.enter_context((folder / f"rank{rank}.log").open("a"))
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
            processes.append(process)
        end = time.monotonic() + timeout
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break  # the others wait for it in vain
            time.sleep(0.1)
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log")))
    assert all(process.returncode == 0 for process in processes), logs
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def run_scenario(name: str, folder: Path, processes: Any) -> dict[str, Any]:
    from echo4o.train.engine.deepspeed import DeepSpeedEngine
    from echo4o.train.parallelize import apply_activation_checkpointing

    scenario = SCENARIOS[name]
    bagel.CE_CHUNK = scenario.ce_chunk
    weights = tiny_weights(scenario.tied)
    mine = range(processes.rank, len(PACKS), processes.world_size)
    settings = folder / f"{name}.{processes.rank}.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": scenario.stage, **scenario.zero}}))
    engine = DeepSpeedEngine(
        processes,
        torch.device("cpu"),
        getattr(torch, scenario.dtype),
        zero_stage=scenario.stage,
        cpu_offload=scenario.cpu_offload,
        reduce_dtype=getattr(torch, scenario.reduce_dtype),
        config_file=settings,
        gradient_accumulation_steps=len(mine),
        max_grad_norm=MAX_NORM,
    )
    model = tiny_model(scenario.tied, weights if scenario.values else None)
    apply_activation_checkpointing(model, scenario.recompute)
    engine.prepare(model, adamw, None if scenario.values else lambda pieces: fill(pieces, weights))
    at_first = engine.consolidate(engine.trained() | engine.frozen())
    pieces_at_first = engine.trained()
    if scenario.resume:
        state = torch.load(folder / scenario.resume, weights_only=False)["state"]
        fill(engine.trained(), state["trained"])
        fill(engine.optimizer_slots(create=state["slots"]), state["slots"])
        engine.set_optimizer_steps(state["steps"])
        engine.refresh()
    losses, norms, state = [], [], None
    for step in range(scenario.first, scenario.first + scenario.steps):
        if scenario.poisoned and step == scenario.first + 1:
            norms.append(_poisoned(engine, packs_of_step(0), mine))
        loss, norm = _step(engine, packs_of_step(step), mine)
        losses.append(loss)
        norms.append(norm)
        if step == 1:
            state = {
                "trained": engine.consolidate(engine.trained()),
                "slots": engine.consolidate(engine.optimizer_slots()),
                "steps": engine.optimizer_steps(),
            }
    found = {
        "losses": losses,
        "norms": norms,
        "names": (sorted(engine.trained()), sorted(engine.frozen())),
        "at_first": at_first,
        "weights": engine.full_state_dict(),
        "state": state,
        "num_owned": engine.gather(sum(p.values.numel() for p in engine.trained().values() if p.owned)),
        "same_storage": all(engine.gather(_same_storage(pieces_at_first, engine.trained()))),
        "num_gathered": sum(p.numel() for p in engine.module.parameters()) / sum(t.numel() for t in weights.values()),
    }
    with torch.no_grad():
        packs = packs_of_step(9)
        found["eval_loss"] = float(sum(loss_of(engine.module, pack, totals_of(packs)) for pack in packs))
    return found


def _step(engine: Any, packs: list, mine: range) -> tuple[float, float]:
    loss = _accumulate(engine, packs, mine)
    norm = engine.clip_grad_norm(MAX_NORM)
    for group in engine.optimizer.param_groups:
        group["lr"] = LR
    engine.step()
    engine.zero_grad()
    return float(engine.all_reduce_sum(torch.tensor([loss], dtype=torch.float64))), norm


def _poisoned(engine: Any, packs: list, mine: range) -> float:
    _accumulate(engine, packs, mine, factor=float("nan"))
    norm = engine.clip_grad_norm(MAX_NORM)
    engine.zero_grad()
    return norm


def _accumulate(engine: Any, packs: list, mine: range, factor: float = 1.0) -> float:
    totals, total = totals_of(packs), 0.0
    for number in mine:
        with engine.no_sync(enabled=number != mine[-1]):
            with engine.autocast():
                loss = loss_of(engine.module, packs[number], totals)
            engine.backward(loss * factor)
        total += float(loss)
    return total


def _same_storage(before: Mapping[str, Piece], after: Mapping[str, Piece]) -> bool:
    return all(
        before[name].values.data_ptr() == piece.values.data_ptr() and before[name].values.equal(piece.values)
        for name, piece in after.items()
    )


def fill(pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor]) -> None:
    for name, piece in pieces.items():
        piece.values.copy_(tensors[name].reshape(-1)[piece.start : piece.stop])


def _named_results(folder: Path, names: list[str]) -> Iterator[None]:
    from echo4o.train.processes import Processes

    processes = Processes.from_environment(timeout=120.0)
    for name in names:
        found = run_scenario(name, folder, processes)
        if processes.rank == 0:
            torch.save(found, folder / f"{name}.pt")
        processes.barrier()
        yield
    processes.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _ in _named_results(Path(sys.argv[1]), sys.argv[2:]):
        pass
