"""What users ask of the pipeline beyond the recorded cases: places of references, sizes, seeds, memory, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.generate.context import Addition, Context, KVPool, LatentImage, Reader
from echo4o.generate.encoding import ImageEncoder
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model.embeddings import patchify_latents, unpatchify_latents
from echo4o.packed import PackedBatch
from tests.train.tiny_run import write_bagel

FEW = {"num_timesteps": 4}
PROMPT = "the shape of image 1 on image 2"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Echo4oPipeline:
    folder = write_bagel(tmp_path_factory.mktemp("model") / "tiny")
    return Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu")


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def two() -> list[Image.Image]:
    return [picture(1), picture(2, 48, 64)]


def latents(out, number: int = 0) -> torch.Tensor:
    return out.info[number]["latents"]


def test_placeholders_put_references_inline(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    inline = pipe("a shape of <image 2> on <image 1>", two, **FEW)
    by_hand = pipe.interleave(["a shape of", two[1], "on", two[0]], **FEW)
    assert torch.equal(latents(inline), latents(by_hand))
    assert not torch.equal(
        latents(inline), latents(pipe("a shape of <image 2> on <image 1>", two, inline=False, **FEW))
    )


def test_references_that_no_placeholder_names_come_first(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    request = pipe.prompt_request("on <image 2> please", two)
    assert request.elements == (two[0], "on", two[1], "please")


def test_a_prompt_without_placeholders_is_kept_to_the_letter(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    assert pipe.prompt_request("  a cat \n", two).elements == (*two, "  a cat \n")


def test_images_may_be_files(pipe: Echo4oPipeline, two: list[Image.Image], tmp_path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, two, strict=True):
        image.save(path)
    expected = latents(pipe(PROMPT, two, **FEW))
    assert torch.equal(latents(pipe(PROMPT, [str(path) for path in paths], **FEW)), expected)
    assert torch.equal(latents(pipe(PROMPT, [paths[0], paths[1].read_bytes()], **FEW)), expected)
    answers = [pipe.understand("what?", [image], max_think_tokens=8) for image in (two[0], str(paths[0]))]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="image missing: missing.png"):
        pipe(PROMPT, ["missing.png"])
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(ValueError, match="0.png"):
        pipe(PROMPT, paths)


def test_an_image_of_several_requests_is_encoded_once(pipe: Echo4oPipeline, two: list, monkeypatch) -> None:
    encoded = []
    moments = type(pipe.vae).moments
    monkeypatch.setattr(type(pipe.vae), "moments", lambda self, x: (encoded.append(1), moments(self, x))[1])
    out = pipe(PROMPT, two, num_images=3, **FEW)
    assert len(encoded) == 2
    assert torch.allclose(latents(out, 2), latents(pipe(PROMPT, two, seed=2, **FEW)), atol=1e-4)


@pytest.mark.parametrize("prompt", ["<image 3> alone", "<image 0> alone"])
def test_a_placeholder_without_image(pipe: Echo4oPipeline, two: list[Image.Image], prompt: str) -> None:
    with pytest.raises(ValueError, match="placeholder.*inline=False"):
        pipe(prompt, two)


def test_each_image_has_a_seed_of_its_own(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    several = pipe(PROMPT, two, seed=3, num_images=3, **FEW)
    assert [info["seed"] for info in several.info] == [3, 4, 5]
    alone = pipe(PROMPT, two, seed=5, **FEW)
    torch.testing.assert_close(latents(several, 2), latents(alone), atol=1e-4, rtol=1e-4)
    assert (latents(several, 0) - latents(several, 1)).abs().max() > 0.1


def test_sampled_text_does_not_depend_on_the_batch(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_think_tokens": 12}
    requests = [
        pipe.request([picture(seed), "what is this?"], "understand", understand=True, seed=seed, **sampled)
        for seed in range(4)
    ]
    together = [info["text"] for info in pipe.batch(requests).info]
    assert together == [pipe.batch([request]).info[0]["text"] for request in requests]
    assert len(set(together)) > 1


def test_texts_written_together_lie_in_few_places(pipe: Echo4oPipeline, monkeypatch) -> None:
    """Rows of texts that interleave token by token would make every token attend to as many ranges as there are."""
    plans, pools = [], []
    plan = Reader.plan

    def watch(self, additions):
        pools.append(self.pool)
        plans.append(plan(self, additions))
        return plans[-1]

    def endless(self, hidden):
        logits = self.model.language_model.lm_head(hidden).float()
        logits[:, self.markers.eos_token_id] = float("-inf")
        return logits

    monkeypatch.setattr(Reader, "logits", endless)
    asked = {"max_think_tokens": 300, "do_sample": True, "temperature": 5.0, "understand": True}
    requests = [pipe.request([f"question {seed}"], "understand", seed=seed, **asked) for seed in range(3)]
    alone = [pipe.batch([request]).info[0]["text"] for request in requests]
    monkeypatch.setattr(Reader, "plan", watch)
    together = [info["text"] for info in pipe.batch(requests).info]
    assert together == alone
    assert max(len(split.key_ranges) for layout in plans for split in layout.splits) <= 5  # blocks of 64, 128, 256
    assert pools[-1].length == sum(info["context_tokens"]["full"] for info in pipe.batch(requests).info)


def test_a_long_text_is_read_in_parts(pipe: Echo4oPipeline, monkeypatch) -> None:
    whole = latents(pipe("a long story " * 12, height=32, width=32, **FEW))
    monkeypatch.setattr("echo4o.generate.pipeline.TEXT_PART", 16)
    torch.testing.assert_close(
        latents(pipe("a long story " * 12, height=32, width=32, **FEW)), whole, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("missing", ["visual_gen", "visual_und"])
def test_models_without_a_branch(pipe: Echo4oPipeline, tmp_path, missing: str) -> None:
    folder = write_bagel(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, missing: False}))
    partial = Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu")
    if missing == "visual_gen":
        assert partial.understand("what?", [picture(1)], max_think_tokens=4) is not None
        with pytest.raises(ValueError, match="it can only answer in text"):
            partial("a cat", height=32, width=32)
    else:
        assert partial("on it", [picture(1)], num_timesteps=2).images
        with pytest.raises(ValueError, match="cannot be asked about images"):
            partial.understand("what?", [picture(1)])


def test_pictures_lie_as_their_exif_says(pipe: Echo4oPipeline, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = tmp_path / "turned.png"
    picture(1, 128, 64).save(path, exif=exif)
    as_path, opened = (pipe("it", [image], num_timesteps=2).images[0].size for image in (path, Image.open(path)))
    assert as_path == opened and as_path[0] < as_path[1]


def test_output_size(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    def size(**keywords):
        return pipe(PROMPT, two, num_timesteps=2, **keywords).images[0].size

    sizes = [pipe.vae_transform.target_size(*image.size) for image in two]
    assert sizes[0] != sizes[1]
    assert size() == size(size_from="last") == size(size_from=2) == sizes[1]
    assert size(size_from="first") == size(size_from=1) == sizes[0]
    assert size(height=32, width=48) == (48, 32)
    swapped = pipe("<image 2> on <image 1>", two, num_timesteps=2, size_from=2)
    assert swapped.images[0].size == sizes[1], "size_from names image 2, though it is read first"
    side = pipe.model.config.max_latent_size * pipe.model.config.latent_downsample
    assert pipe("nothing seen", num_timesteps=2).images[0].size == (side, side)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"height": 32}, "height and width together"),
        ({"height": 30, "width": 32}, "multiples of 16"),
        ({"height": 4096, "width": 32}, "up to .* the model's position table"),
        ({"size_from": 3}, "there are 2 references"),
        ({"size_from": "middle"}, "first, last"),
        ({"preset": "paint"}, "unknown preset 'paint'; choose one of t2i"),
        ({"cfg_renorm_type": "local"}, "global, channel, text_channel"),
        ({"cfg_interval": (0.9, 0.1)}, "0 ≤ low ≤ high ≤ 1"),
        ({"num_timesteps": 1}, "at least 2"),
        ({"branch_cache": 0}, "at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"timestep_shift": float("nan")}, "above 0 and finite"),
        ({"cfg_text_scale": float("inf")}, "finite"),
        ({"do_sample": True, "temperature": 1e-44}, "temperature"),
        ({"preset": "understand"}, "draws nothing"),
        ({"num_images": 2, "noise": torch.zeros(6, 64)}, "same"),
    ],
)
def test_impossible_settings(pipe: Echo4oPipeline, two: list[Image.Image], keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, two, **keywords)


def test_misspelt_settings_name_the_nearest(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    with pytest.raises(TypeError, match="'cfg_text_scal'; did you mean cfg_text_scale"):
        pipe(PROMPT, two, cfg_text_scal=3.0)
    with pytest.raises(TypeError, match="must be a list"):
        pipe(PROMPT, two[0])
    with pytest.raises(ValueError, match="needs a text"):
        pipe("  ", two)


def test_steps_are_told_and_can_end_the_run(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    told = []
    pipe(PROMPT, two, on_step=lambda done, total: told.append((done, total)), **FEW)
    assert told == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, two, on_step=stop, **FEW)


def test_keys_and_values_grow_with_references_by_the_formula(pipe: Echo4oPipeline, monkeypatch) -> None:
    pools: list[KVPool] = []
    sizes: list[int] = []
    init, reserve = KVPool.__init__, KVPool.reserve
    monkeypatch.setattr(KVPool, "__init__", lambda self, *a: (init(self, *a), pools.append(self))[0])

    def watch(self, rows: int) -> None:
        reserve(self, rows)
        sizes.append(self.capacity)

    monkeypatch.setattr(KVPool, "reserve", watch)
    llm, capacities = pipe.model.config.llm, []
    for number in range(1, 6):
        sizes.clear()
        out = pipe("together", [picture(i, 64, 64) for i in range(number)], preset="multi_ref", **FEW)
        assert len(set(sizes)) == 1, "the pool was copied during the run"
        capacities.append(pools[-1].capacity)
        row = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * 4
        assert pools[-1].num_bytes == pools[-1].capacity * row
    # What is read is written once: the text-less context shares it, the image-less one has the text of its own.
    width, height = pipe.vae_transform.target_size(64, 64)
    vit = pipe.vit_transform(picture(0, 64, 64).resize((width, height)))
    reference = width * height // 16**2 + 2 + vit.shape[1] * vit.shape[2] // pipe.model.config.vit.patch_size**2 + 2
    assert np.diff(capacities).tolist() == [reference] * 4
    assert out.info[0]["context_tokens"]["no_text"] == 5 * reference


def test_reading_and_drawing_in_several_passes(pipe: Echo4oPipeline, two: list[Image.Image], monkeypatch) -> None:
    requests = [pipe.prompt_request(PROMPT, two, seed=seed, **FEW) for seed in range(3)]
    at_once = pipe.batch(requests)
    passes = []
    plan = Reader.plan
    monkeypatch.setattr(Reader, "plan", lambda self, additions: (passes.append(1), plan(self, additions))[1])
    init = Reader.__init__
    monkeypatch.setattr(Reader, "__init__", lambda self, *a: init(self, *a, max_tokens=40))
    in_parts = pipe.batch(requests)
    assert len(passes) > 10
    for number in range(3):
        torch.testing.assert_close(latents(in_parts, number), latents(at_once, number), atol=1e-4, rtol=1e-4)


def test_a_branch_that_equals_another_is_not_computed(
    pipe: Echo4oPipeline, two: list[Image.Image], monkeypatch
) -> None:
    branches = []
    features = Reader.features
    monkeypatch.setattr(
        Reader, "features", lambda self, p, *a: (branches.append(len(p.pieces)), features(self, p, *a))[1]
    )
    pipe.interleave(["put it here", *two], **FEW)  # ends with an image: nothing comes after what is without text
    assert branches == [2, 2, 2]
    branches.clear()
    pipe("a cat", height=32, width=32, preset="multi_ref", **FEW)  # no image to leave out
    assert branches == [2, 2, 2]
    branches.clear()
    pipe(PROMPT, two, cfg_interval=(0.9, 1.0), **FEW)
    assert branches == [3, 1, 1]


def test_the_cached_path_equals_the_training_forward(pipe: Echo4oPipeline, two: list[Image.Image]) -> None:
    """Reference, text and noised target in one packed sequence, as in training, and read into the pool one by one."""
    model, reader = pipe.model, Reader(pipe.model, pipe.markers)
    generator = torch.Generator().manual_seed(0)
    encoder = ImageEncoder(pipe.vae, 2, pipe.vae_transform, pipe.vit_transform)
    reference, text = encoder.latents(two[0], None, generator), pipe._text(PROMPT)
    seen = reader.vit_image(encoder.pixels(two[0]))
    grid, t = (2, 3), 0.3
    x = torch.randn(6, model.config.latent_dim, generator=generator)

    contexts, _ = reader.extend(chain([reference, seen, text]))
    layout = reader.plan([Addition(contexts[-1], LatentImage(x, grid, t))])
    cached = model.velocity(reader.features(layout, x, torch.tensor([t]))[0])

    batch = training_batch(reader, [reference, seen, text, LatentImage(x, grid, t)], t)
    # Latents and noise alike: whatever the time, the noised target is x, and the reference is clean.
    tokens = torch.cat([reference.tokens, x])
    hidden = model.forward(batch, tokens, noise=tokens).last_hidden_state
    torch.testing.assert_close(model.llm2vae(hidden[-7:-1]), cached, atol=1e-5, rtol=1e-4)


def chain(pieces: Sequence) -> list[Addition]:
    """Every piece after the one before it."""
    return [Addition(Context() if i == 0 else i - 1, piece) for i, piece in enumerate(pieces)]


def training_batch(reader: Reader, pieces: list, t: float) -> PackedBatch:
    """The pieces as one training sample: the last one a target with noise at time t."""
    layout = Reader(reader.model, reader.markers).plan(chain(pieces))
    batch, length = layout.batch, layout.num_tokens
    shift = reader.model.config.timestep_shift
    unshifted = torch.tensor(t / (shift + t - shift * t))
    latent_tokens = [piece.num_tokens - 2 for piece in pieces if isinstance(piece, LatentImage)]
    times = [float("-inf")] * latent_tokens[0] + [float(unshifted.logit())] * latent_tokens[1]
    values = vars(batch) | {
        "sample_lens": [length],
        "attn_modes": ["full", "full", "causal", "noise"],
        "packed_timesteps": torch.tensor(times),
        "mse_loss_indexes": torch.arange(length - 1 - latent_tokens[1], length - 1),
    }
    return PackedBatch(**values)


def test_latents_of_any_grid_survive_the_round_trip(pipe: Echo4oPipeline) -> None:
    latent = torch.randn(16, 6, 4)
    assert torch.equal(unpatchify_latents(patchify_latents([latent], 2), [(3, 2)], 2)[0], latent)
