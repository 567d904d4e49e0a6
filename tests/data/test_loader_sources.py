"""The loader over the example data: all four kinds of rows from files, through worker processes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from echo4o.data.loader import LoaderConfig, PackedLoader
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sources.base import Limits, SourceContext
from echo4o.data.sources.build import build_sources
from echo4o.data.tokenizer import SpecialTokens

EXAMPLES = Path(__file__).resolve().parents[2] / "data_examples"
MARKERS = SpecialTokens(256, 257, 258, 259)


class ByteTokenizer:
    def encode(self, text):
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode()

    def __len__(self):
        return 260


def build_loader(num_workers=0, rank=0, world_size=1, **dropout):
    limits = Limits(max_latent_size=16, vit_max_num_patch_per_side=16)
    context = SourceContext(ByteTokenizer(), MARKERS, data_seed=1, base_dir=EXAMPLES, limits=limits)
    groups = build_sources(yaml.safe_load((EXAMPLES / "dataset_mixed.yaml").read_text()), context)
    packer = Packer(PackingConfig(256, 257, 258, 259, max_latent_size=16, vit_max_num_patch_per_side=16, **dropout))
    config = LoaderConfig(
        expected_num_tokens=1800,
        max_num_tokens=2000,
        max_num_tokens_per_sample=1500,
        prefer_buffer_before=1000,
        max_buffer_size=10,
        num_workers=num_workers,
        worker_timeout=60,
    )
    return PackedLoader(groups, packer, config, rank, world_size)


def same(one, other):
    for name, value in vars(one).items():
        others = getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, others), name
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            assert all(torch.equal(a, b) for a, b in zip(value, others, strict=True)), name
        else:
            assert value == others, name


def test_packs_are_valid_and_mixed():
    with build_loader() as loader:
        batches = [next(loader) for _ in range(12)]
    for batch in batches:
        batch.validate()
        assert {"example_multi_ref", "example_vlm"} <= set(batch.sample_names)
    assert {name for batch in batches for name in batch.sample_names} == {
        "example_multi_ref",
        "example_t2i",
        "example_edit",
        "example_vlm",
    }
    assert loader.counters()["bad_rows"] == 0
    assert all(seconds > 0 for seconds in loader.timings().values())


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_packs_are_full_with_and_without_dropout(probability):
    with build_loader(vae_cond_dropout_prob=probability, vit_cond_dropout_prob=probability) as loader:
        assert sum(next(loader).sequence_length for _ in range(12)) / 12 / 2000 > 0.95


def test_plans_announce_the_exact_length_of_their_samples():
    with build_loader() as loader:
        for group in loader.groups:
            for position in range(len(group.source)):
                plan = group.source.plan(0, position)
                sample = plan.load()
                assert plan.num_tokens == sum(loader.packer.num_tokens(segment) for segment in sample.segments)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_stream_gives_the_same_tensors(num_workers):
    dropout = {"text_cond_dropout_prob": 0.1, "vae_cond_dropout_prob": 0.3, "vit_cond_dropout_prob": 0.3}
    with build_loader(num_workers, **dropout) as loader:
        for _ in range(3):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [next(loader) for _ in range(4)]
    with build_loader(num_workers, **dropout) as restored:
        restored.load_state_dict({0: state}.__getitem__, 1)
        for batch in expected:
            same(batch, next(restored))


def test_workers_deliver_shared_memory():
    with build_loader(num_workers=1) as loader:
        batch = next(loader)
        assert batch.packed_vit_tokens.is_shared() and batch.vae_images[0].is_shared()
