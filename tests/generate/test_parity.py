"""The pipeline against the reference's recorded runs: contexts, velocities, images and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from echo4o.generate.context import Reader
from echo4o.generate.drawing import draw
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.sampler import Guidance, shifted_schedule
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder

MULTIREF = [
    "multiref_global", "multiref_channel", "multiref_text_channel", "multiref_text_channel_interval",
    "multiref_global_renorm_min", "multiref_no_cfg", "multiref_text_cfg_only",
]  # fmt: skip
DRAWN = [*MULTIREF, "t2i", "t2i_img_cfg", "interleaved", "multiref_think"]


class NumberTokenizer:
    """Texts are token ids with spaces between them; other words (system prompts) are spelled out, as recorded."""

    def encode(self, text: str) -> list[int]:
        words = text.split()
        return [int(w) for w in words] if all(w.isdigit() for w in words) else [ord(c) % 500 for c in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Recorded:
    def __init__(self, parity: Path) -> None:
        self.json = json.loads((parity / "inference" / "outputs.json").read_text())
        self.tensors = load_file(parity / "inference" / "outputs.safetensors")
        folder = parity / "multiref"
        self.pipe = Echo4oPipeline(
            Bagel.from_pretrained(folder), AutoEncoder.from_pretrained(folder), NumberTokenizer(),
            self.json["special_tokens"], self.json["vae_transform"], self.json["vit_transform"],
        )  # fmt: skip

    def image(self, name: str) -> Image.Image:
        return Image.fromarray(self.tensors[name].numpy())

    def elements(self, name: str) -> list:
        if name == "interleaved":
            return [self.image(e) if e.startswith("ref_") else e for e in self.json["interleaved_input"]]
        variant = self.json["variants"][name]
        return [*(self.image(f"ref_image{i}") for i in range(variant["n_images"])), variant["prompt"]]

    def request(self, name: str, **keywords):
        variant = self.json["variants"][name]
        request_only = ("think", "max_think_token_n", "understanding_output", "do_sample", "image_shapes")
        settings = {key: value for key, value in variant["args"].items() if key not in request_only}
        settings["cfg_interval"] = tuple(settings["cfg_interval"])
        noises = [self.tensors[f"{name}/vae_noise_{i}"][0] for i in range(3) if f"{name}/vae_noise_{i}" in self.tensors]
        if variant["args"].get("think"):
            keywords |= {"think": True, "max_think_tokens": variant["args"]["max_think_token_n"]}
        height, width = variant["image_shape"]
        return self.pipe.request(
            self.elements(name), "multi_ref", height=height, width=width, noise=self.tensors[f"{name}/init_noise"],
            reference_noise=tuple(noises), **settings, **keywords,
        )  # fmt: skip


@pytest.fixture
def recorded(parity) -> Recorded:
    return Recorded(parity)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_images(name: str, recorded: Recorded, monkeypatch) -> None:
    variant, tensors = recorded.json["variants"][name], recorded.tensors
    seen = {"velocities": [], "contexts": None, "pool": None}
    guide = type(recorded.request(name).settings.guidance).combine

    def watch(self, t, *branches):
        velocity = guide(self, t, *branches)
        seen["velocities"].append((t, velocity))
        return velocity

    def watch_draw(reader, states, on_step):
        seen["pool"], seen["contexts"] = reader.pool, states[0]
        draw(reader, states, on_step)

    monkeypatch.setattr("echo4o.generate.sampler.Guidance.combine", watch)
    monkeypatch.setattr("echo4o.generate.pipeline.draw", watch_draw)
    out = recorded.pipe.batch([recorded.request(name)])

    if variant["text_output"] is not None:
        assert out.texts[0].split() == variant["text_output"].split()
    state, pool = seen["contexts"], seen["pool"]
    for ours, theirs in (("full", "ctx"), ("no_text", "cfg_text"), ("no_image", "cfg_img")):
        context = getattr(state, ours)
        assert [context.kv_len] == variant[f"{theirs}_kv_lens"]
        assert [context.rope] == variant[f"{theirs}_ropes"]
        for kind, layers in (("key", pool.keys), ("value", pool.values)):
            for layer, place in ((0, "0"), (-1, "last")):
                cached = tensors.get(f"{name}/{theirs}_{kind}_cache_{place}")
                if cached is not None:
                    rows = torch.cat([layers[layer][start:end] for start, end in context.ranges])
                    torch.testing.assert_close(rows, cached, atol=1e-5, rtol=1e-4)
    assert [t for t, _ in seen["velocities"]] == pytest.approx(variant["timesteps"], abs=1e-6)
    for (_, velocity), expected in zip(seen["velocities"], tensors[f"{name}/v_t"], strict=True):
        assert relative(velocity, expected) < 1e-3
    assert relative(out.info[0]["latents"], tensors[f"{name}/final_latent"]) < 1e-3
    drawn = torch.tensor(list(out.images[0].tobytes())).view(tensors[f"{name}/image"].shape)
    assert (drawn - tensors[f"{name}/image"].long()).abs().max() <= 1


@pytest.mark.parametrize("name", ["understand", "understand_multi"])
def test_understanding(name: str, recorded: Recorded) -> None:
    variant = recorded.json["variants"][name]
    images = [recorded.image(f"ref_image{i}") for i in range(variant["n_images"])]
    answer = recorded.pipe.understand(variant["prompt"], images, max_think_tokens=variant["args"]["max_think_token_n"])
    assert answer.split() == variant["text_output"].split()
    ids = recorded.tensors[f"{name}/text_ids_0"].flatten().tolist()
    assert answer.split() == [str(i) for i in ids[1:]]


def test_logits_of_the_first_answer(recorded: Recorded, monkeypatch) -> None:
    logits = []
    original = Reader.logits

    def watch(self, hidden):
        logits.append(original(self, hidden))
        return logits[-1]

    monkeypatch.setattr(Reader, "logits", watch)
    recorded.pipe.understand(recorded.json["und_prompt"], [recorded.image("ref_image0")], max_think_tokens=12)
    expected = recorded.tensors["understand/text_logits_0"][: len(logits)]
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=1e-3)


def test_a_batch_equals_its_requests_one_by_one(recorded: Recorded) -> None:
    """Six requests of other sizes, counts, guidance and tasks in one packed run."""
    names = ["multiref_global", "t2i", "interleaved", "multiref_channel", "multiref_no_cfg", "t2i_img_cfg"]
    requests = [recorded.request(name) for name in names]
    together = recorded.pipe.batch(requests)
    for number, request in enumerate(requests):
        alone = recorded.pipe.batch([request])
        torch.testing.assert_close(together.info[number]["latents"], alone.info[0]["latents"], atol=1e-4, rtol=1e-4)


def test_schedule_is_the_published_one() -> None:
    times = shifted_schedule(50, 3.0)
    steps = -times.diff()
    assert len(steps) == 49 and steps.sum().item() == pytest.approx(1.0)
    assert steps[0].item() == pytest.approx(0.0069, abs=1e-4) and steps[-1].item() == pytest.approx(0.0588, abs=1e-4)
    assert sum(0.4 < t <= 1.0 for t in times[:-1].tolist()) == 41


@pytest.mark.parametrize(
    ("num_timesteps", "shift", "interval"),
    [(50, 3.0, (0.4, 1.0)), (12, 3.0, (0.4, 1.0)), (11, 1.0, (0.4, 0.8)), (21, 1.0, (0.0, 0.6))],
)
def test_guidance_acts_at_the_references_steps(num_timesteps: int, shift: float, interval: tuple) -> None:
    """Upstream compares a float32 tensor with the limits."""
    guidance = Guidance(4.0, 2.0, interval)
    for t in shifted_schedule(num_timesteps, shift)[:-1]:
        active = bool(t > interval[0]) and bool(t <= interval[1])
        assert guidance.scales_at(float(t)) == ((4.0, 2.0) if active else (1.0, 1.0)), float(t)
