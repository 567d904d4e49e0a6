"""The packer against upstream's packed batches, and the properties that every pack must have."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from echo4o.data.errors import GridError
from echo4o.data.packing import BudgetError, Packer, PackingConfig, len2weight
from echo4o.data.sample import Sample, Segment
from echo4o.data.tokenizer import SpecialTokens
from echo4o.model import BagelConfig

EXTRA = ["moe", "dense", "vit_rope", "interpolate_pos", "tied", "no_qk_norm"]
EXTRA += ["und_only", "gen_only", "timestep_shift", "ten_refs"]
CASES = ["multiref", "mixed", "frames", *(f"extra/{name}" for name in EXTRA)]
INTEGER_FIELDS = [
    "packed_text_ids",
    "packed_text_indexes",
    "packed_position_ids",
    "packed_vit_token_indexes",
    "packed_vit_position_ids",
    "vit_token_seqlens",
    "packed_latent_position_ids",
    "packed_vae_token_indexes",
    "mse_loss_indexes",
    "packed_label_ids",
    "ce_loss_indexes",
]
CONFIG = PackingConfig(
    bos_token_id=500,
    eos_token_id=501,
    start_of_image=502,
    end_of_image=503,
    max_latent_size=8,
    vit_max_num_patch_per_side=6,
)


def load_case(folder):
    tensors = load_file(folder / "samples.safetensors")
    samples = [
        Sample.from_plan(
            entry["sequence_plan"],
            entry["text_ids_list"],
            [tensors[key] for key in entry["image_keys"]],
            name=f"set{index}",
            row=f"file:{index}",
        )
        for index, entry in enumerate(json.loads((folder / "samples.json").read_text()))
    ]
    packer = Packer(json.loads((folder / "bagel_config.json").read_text()))
    return packer, samples, json.loads((folder / "batch.json").read_text()), load_file(folder / "batch.safetensors")


def integers(value):
    """A field as a plain list; an absent one as an empty list (upstream's packer state holds empty lists)."""
    return [] if value is None else torch.as_tensor(value).tolist()


@pytest.mark.parametrize("case", CASES)
def test_pack_equals_upstream(parity, case):
    packer, samples, lists, tensors = load_case(parity / case)
    batch = packer.pack(samples, torch.Generator().manual_seed(0))
    batch.validate()
    assert batch.sequence_length == lists["sequence_length"]
    assert batch.sample_lens == lists["sample_lens"]
    assert batch.split_lens == lists["flex"]["split_lens"][:-1]
    assert batch.attn_modes == lists["flex"]["attn_modes"][:-1]
    assert integers(batch.patchified_vae_latent_shapes) == lists.get("patchified_vae_latent_shapes", [])
    for name in INTEGER_FIELDS:
        found = getattr(batch, name)
        assert (found is None) == (name not in tensors), name
        if found is not None:
            assert found.dtype == torch.int64
            assert torch.equal(found, tensors[name]), name
    for name in ("packed_vit_tokens", "ce_loss_weights"):
        if name in tensors:
            torch.testing.assert_close(getattr(batch, name), tensors[name], atol=1e-6, rtol=0)
    if "packed_timesteps" in tensors:
        assert torch.equal(batch.packed_timesteps == float("-inf"), tensors["packed_timesteps"] == float("-inf"))


@pytest.mark.parametrize("case", CASES)
def test_timesteps_can_be_given(parity, case):
    packer, samples, _, tensors = load_case(parity / case)
    recorded = tensors.get("packed_timesteps", torch.empty(0))
    steps = [value for value, _ in itertools.groupby(recorded.tolist()) if value > float("-inf")]
    batch = packer.pack_with_drops(samples, [[False] * len(sample.segments) for sample in samples], steps)
    assert integers(batch.packed_timesteps) == recorded.tolist()


@pytest.mark.parametrize("case", CASES)
def test_recorded_dropouts_are_reproduced(parity, case):
    """Upstream drew other segments than we would; some choice of droppable segments gives exactly its pack.

    One exception: when the last frame of a video is dropped, upstream forgets to close the split, so that its lengths
    no longer add up to the pack. Ours do.
    """
    packer, samples, lists, _ = load_case(parity / case)
    assert lists["dropout"]
    for recorded in lists["dropout"]:
        expected = {
            "patchified_vae_latent_shapes": recorded["vae_latent_shapes"],
            "attn_modes": recorded["attn_modes"],
            **{name: recorded[name] for name in INTEGER_FIELDS if name in recorded},
        }
        if sum(recorded["sample_lens"]) == recorded["curr"]:
            expected |= {name: recorded[name] for name in ("sample_lens", "split_lens")}
        steps = [float(step) for step in recorded["timesteps"] if float(step) > float("-inf")]
        packs = [packer.pack_with_drops(samples, drops, steps + [0.0] * 8) for drops in drop_choices(samples, recorded)]
        for pack in packs:
            pack.validate()
        assert expected in [{name: comparable(getattr(pack, name)) for name in expected} for pack in packs]


def comparable(value):
    return list(value) if isinstance(value, list) and value and isinstance(value[0], str) else integers(value)


def drop_choices(samples, recorded):
    """Drop flags of every sample, for each way to drop droppable segments that leaves the recorded images and texts."""
    segments = [(index, segment) for index, sample in enumerate(samples) for segment in sample.segments]
    kept_ids = [token for token in recorded["packed_text_ids"] if token not in (500, 501, 502, 503)]
    contents = {
        "vae_image": (lambda s: [[s.image.shape[1] // 16, s.image.shape[2] // 16]], recorded["vae_latent_shapes"]),
        "vit_image": (lambda s: [s.image.shape[1] // 14 * (s.image.shape[2] // 14)], recorded["vit_token_seqlens"]),
        "text": (lambda s: [token for token in s.text_ids if token not in (500, 501, 502, 503)], kept_ids),
    }
    per_kind = []
    for kind, (content, wanted) in contents.items():
        places = [place for place, (_, segment) in enumerate(segments) if segment.kind == kind]
        items = [(content(segments[place][1]), segments[place][1].droppable) for place in places]
        per_kind.append([dict(zip(places, flags, strict=True)) for flags in selections(items, wanted)])
    for parts in itertools.product(*per_kind):
        dropped = {place: flag for part in parts for place, flag in part.items()}
        yield [
            [dropped[place] for place, (owner, _) in enumerate(segments) if owner == index]
            for index in range(len(samples))
        ]


def selections(items, wanted):
    """Drop flags such that the contents of the kept items, joined, are `wanted`."""
    if not items:
        return [()] if not wanted else []
    (content, droppable), rest = items[0], items[1:]
    found = [(True, *flags) for flags in selections(rest, wanted)] if droppable else []
    if wanted[: len(content)] == content:
        found += [(False, *flags) for flags in selections(rest, wanted[len(content) :])]
    return found


def test_len2weight(parity):
    table = json.loads((parity / "pure" / "pure.json").read_text())["len2weight"]
    for key, weight in table.items():
        reduction, length = key.split(":")
        assert len2weight(int(length), reduction) == pytest.approx(weight)


# --- properties ------------------------------------------------------------------------------------------------------

texts = st.builds(
    Segment,
    kind=st.just("text"),
    text_ids=st.lists(st.integers(0, 499), max_size=6).map(tuple),
    loss=st.booleans(),
    droppable=st.booleans(),
)


def _image(kind, patch, rows, columns, loss, droppable, delta):
    return Segment(
        kind,
        image=torch.full((3, rows * patch, columns * patch), 0.5),
        loss=loss and kind == "vae_image",
        droppable=droppable,
        frame_delta=delta,
    )


images = st.sampled_from([("vae_image", 16), ("vit_image", 14)]).flatmap(
    lambda kind: st.builds(
        _image,
        st.just(kind[0]),
        st.just(kind[1]),
        st.integers(1, 3),
        st.integers(1, 3),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, None, 2]),
    )
)
sample_lists = st.lists(
    st.builds(
        lambda segments, seed: Sample((Segment("text", text_ids=(7,)), *segments), seed=seed),
        st.lists(st.one_of(texts, images), max_size=6),
        st.integers(0, 2**63 - 1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(sample_lists, st.floats(0, 1), st.floats(0, 1))
def test_every_pack_is_valid(samples, probability, joint):
    """Whatever is dropped: all tokens covered once, lengths as announced, split of every token consistent."""
    packer = Packer(
        PackingConfig(
            **{
                **vars(CONFIG),
                "text_cond_dropout_prob": probability,
                "vae_cond_dropout_prob": probability,
                "vit_cond_dropout_prob": probability,
                "all_refs_dropout_prob": joint,
            }
        )
    )
    batch = packer.pack(samples)
    batch.validate()
    assert len(batch.packed_position_ids) == batch.sequence_length
    assert batch.sample_lens == [packer.laid_down_tokens(sample) for sample in samples]
    if batch.packed_timesteps is not None:
        vae = batch.packed_vae_token_indexes
        noised = vae[batch.packed_timesteps > float("-inf")]
        assert integers(batch.mse_loss_indexes) == noised.tolist()
        assert len(batch.vae_image_indexes) == len(batch.vae_seeds) == len(batch.patchified_vae_latent_shapes)
        assert max(batch.vae_image_indexes) == len(batch.vae_images) - 1
    alone = [packer.pack([sample]) for sample in samples]
    assert torch.equal(batch.packed_position_ids, torch.cat([one.packed_position_ids for one in alone]))
    assert batch.attn_modes == [mode for one in alone for mode in one.attn_modes]


def reference(rows=2, columns=2, **kwargs):
    return (
        _image("vae_image", 16, rows, columns, False, True, None),
        _image("vit_image", 14, rows, columns, False, True, None),
    )


def multi_ref_sample(num_refs, seed):
    references = [segment for _ in range(num_refs) for segment in reference()]
    target = _image("vae_image", 16, 2, 2, True, False, None)
    return Sample((*references, Segment("text", text_ids=(1, 2), droppable=True), target), seed=seed)


def dropped_flags(packer, num_samples, num_refs=3):
    return np.array([packer.decide((s := multi_ref_sample(num_refs, seed)).segments, s.seed).dropped
                     for seed in range(num_samples)])  # fmt: skip


def test_dropout_rates_by_kind():
    packer = Packer(
        PackingConfig(
            **{
                **vars(CONFIG),
                "text_cond_dropout_prob": 0.1,
                "vae_cond_dropout_prob": 0.3,
                "vit_cond_dropout_prob": 0.5,
            }
        )
    )
    rates = dropped_flags(packer, 3000).mean(axis=0)
    np.testing.assert_allclose(rates, [0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.1, 0.0], atol=0.04)


def test_joint_dropout_takes_all_references_and_nothing_else():
    packer = Packer(PackingConfig(**{**vars(CONFIG), "all_refs_dropout_prob": 0.25}))
    flags = dropped_flags(packer, 2000)
    assert set(map(tuple, flags.tolist())) == {(False,) * 8, (True,) * 6 + (False, False)}
    assert flags[:, 0].mean() == pytest.approx(0.25, abs=0.04)


def test_a_sample_is_never_dropped_whole():
    packer = Packer(PackingConfig(**{**vars(CONFIG), "text_cond_dropout_prob": 1.0}))
    assert packer.pack([Sample((Segment("text", text_ids=(1,), droppable=True),), seed=1)]).sequence_length == 3


def test_decisions_belong_to_the_sample():
    """Neighbours, order and the generator change nothing; the seed changes everything."""
    packer = Packer(PackingConfig(**{**vars(CONFIG), "vae_cond_dropout_prob": 0.5}))
    one, two = multi_ref_sample(2, seed=11), multi_ref_sample(3, seed=12)
    first, swapped = packer.pack([one, two], torch.Generator().manual_seed(1)), packer.pack([two, one])
    assert first.sample_lens == swapped.sample_lens[::-1]
    assert set(first.vae_seeds) == set(swapped.vae_seeds)
    assert len(set(first.vae_seeds)) == len(first.vae_seeds)
    assert set(first.packed_timesteps.tolist()) == set(swapped.packed_timesteps.tolist())
    assert packer.pack([multi_ref_sample(2, seed=13)]).vae_seeds[0] not in first.vae_seeds


@pytest.mark.parametrize("make", [lambda: torch.Generator().manual_seed(3), lambda: np.random.default_rng(3)])
def test_samples_without_seed_use_the_generator(make):
    packer = Packer(CONFIG)
    samples = [multi_ref_sample(1, seed=None), multi_ref_sample(1, seed=None)]
    first, again = packer.pack(samples, make()), packer.pack(samples, make())
    assert torch.equal(first.packed_timesteps, again.packed_timesteps)
    assert len(set(first.packed_timesteps.tolist())) == 3


def test_samples_without_seed_and_generator_are_packed_the_same_every_time():
    packer, samples = Packer(CONFIG), [multi_ref_sample(1, seed=None), multi_ref_sample(1, seed=None)]
    first, again = packer.pack(samples), packer.pack(samples, None)
    assert first.packed_timesteps.tolist() == again.packed_timesteps.tolist()
    assert len(set(first.packed_timesteps.tolist())) == 3  # clean, and two samples with noise of their own
    with pytest.raises(TypeError, match="generator"):
        packer.pack(samples, 3)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_model_config_packs_with_the_special_tokens_beside_it(parity, as_mapping):
    folder = parity / "multiref"
    config, tokens = BagelConfig.from_pretrained(folder), SpecialTokens(500, 501, 502, 503)
    with pytest.raises(ValueError, match=r"BagelConfig.* lacks bos_token_id.*Packer\(config, special_tokens\)"):
        Packer(config)
    packer, samples, lists, tensors = load_case(folder)
    ours = Packer(config, vars(tokens) if as_mapping else tokens)
    assert ours.config == packer.config
    assert torch.equal(ours.pack(samples).packed_text_ids, tensors["packed_text_ids"])


def test_given_special_tokens_replace_those_of_the_config():
    assert Packer(CONFIG, {"bos_token_id": 7}).config.bos_token_id == 7
    assert Packer(CONFIG, {"bos_token_id": 7}).config.eos_token_id == CONFIG.eos_token_id


def test_noise_copies_share_one_image_and_one_position():
    target = _image("vae_image", 16, 2, 3, True, False, None)
    batch = Packer(CONFIG).pack([Sample((Segment("text", text_ids=(1,)), target, target, target), seed=5)])
    assert len(batch.vae_images) == 1 and batch.vae_image_indexes == [0, 0, 0]
    assert len(set(batch.vae_seeds)) == 3 and len(set(batch.packed_timesteps.tolist())) == 3
    assert set(batch.packed_position_ids[3:].tolist()) == {3}
    assert batch.attn_modes == ["causal", "noise", "noise", "noise"]


def test_frames_with_a_dropped_end_still_form_a_split():
    """Upstream leaves split_lens and attn_modes of different lengths here; ours stay one entry a split."""
    frame = {"kind": "vae_image", "image": torch.zeros(3, 32, 32), "droppable": True}
    sample = Sample(
        (
            Segment(**frame, split_end=False, frame_delta=2),
            Segment(**frame, split_start=False),
            Segment("text", text_ids=(1,)),
        )
    )
    packer = Packer(CONFIG)
    for drops in ([False, True, False], [True, False, False]):
        batch = packer.pack_with_drops([sample], [drops], [])
        batch.validate()
        assert (batch.split_lens, batch.attn_modes) == ([6, 3], ["full", "causal"])


def test_grid_larger_than_the_table_is_named():
    sample = Sample((_image("vae_image", 16, 9, 2, True, False, None),), seed=0)
    with pytest.raises(GridError, match="8 × 8"):
        Packer(CONFIG).pack([sample])


def test_budget():
    packer = Packer(PackingConfig(**{**vars(CONFIG), "max_num_tokens": 50}))
    with pytest.raises(BudgetError, match="max_num_tokens"):
        packer.pack([multi_ref_sample(4, seed=1)])
    with pytest.raises(BudgetError, match="nothing to pack"):
        packer.pack([])


def test_config_errors_name_the_field():
    with pytest.raises(ValueError, match="start_of_image"):
        Packer({"special_tokens": {"bos_token_id": 0, "eos_token_id": 1, "end_of_image": 3}})
    with pytest.raises(ValueError, match="vae_cond_dropout_prob"):
        PackingConfig(0, 1, 2, 3, vae_cond_dropout_prob=1.5)
    with pytest.raises(ValueError, match="ce_loss_reduction"):
        PackingConfig(0, 1, 2, 3, ce_loss_reduction="cube")
