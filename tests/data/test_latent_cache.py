"""Stores of encoded images: every key is found again, in whichever shard, and nothing else is."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from echo4o.data.errors import DataError
from echo4o.data.latent_cache import IDENTITY, Identity, LatentStore
from echo4o.data.latent_index import SHARDS, damaged_shards, read_index, write_index
from echo4o.data.latent_keys import HASH_BYTES, image_key, key_name, key_of_name, key_size
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sample import Sample, Segment

VAE = Identity("vae_image", "abc", "float32", "float32", patch=8, channels=4)
VIT = Identity("vit_image", "abc", "float32", "bfloat16", patch=14, channels=6)

contents = st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)
sides = st.integers(1, 2**32 - 1)


def write_store(folder: Path, identity: Identity, *shards: dict[bytes, torch.Tensor]) -> None:
    (folder / SHARDS).mkdir(parents=True)
    (folder / IDENTITY).write_text(json.dumps(asdict(identity)))
    for number, tensors in enumerate(shards):
        named = {key_name(key): tensor for key, tensor in tensors.items()}
        save_file(named, folder / SHARDS / f"shard-{number}.safetensors")


@given(contents, sides, sides)
def test_a_key_and_its_name_tell_the_same(content: bytes, width: int, height: int) -> None:
    key = image_key(content, (width, height))
    assert key_of_name(key_name(key)) == key and key_size(key) == (width, height)


@pytest.mark.parametrize("name", ["", "abc", "00.1x1", "00" * 16 + ".1", "00" * 17 + ".1x1", "zz" * 16 + ".1x1"])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(ValueError):
        key_of_name(name)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(contents, st.sampled_from([8, 16, 256])), unique=True, min_size=1, max_size=12),
    st.lists(contents, max_size=3),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_image_is_found_and_no_other(
    tmp_path_factory: pytest.TempPathFactory,
    images: list[tuple[bytes, int]],
    others: list[bytes],
    num_shards: int,
    with_index: bool,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    keys = [image_key(content, (side, 256)) for content, side in images]  # a height of 256 ends in a zero byte
    tensors = {key: torch.randn(VAE.shape(key_size(key))) for key in keys}
    parts = [dict(list(tensors.items())[first::num_shards]) for first in range(num_shards)]
    write_store(folder, VAE, *parts)
    if with_index:
        write_index(folder, read_index(folder, VAE.num_bytes))
    store = pickle.loads(pickle.dumps(LatentStore(folder)))
    assert len(store.index) == len(keys)
    for content, side in images:
        found = store.find(content, (side, 256))
        assert found is not None and torch.equal(found, tensors[image_key(content, (side, 256))])
        assert store.find(content, (side + 8, 256)) is None
    known = {content for content, _ in images}
    assert all(store.find(content, (8, 256)) is None for content in others if content not in known)
    assert store.index.has(np.array(keys, dtype="S24")).all()


def test_shards_that_are_cut_short_or_of_another_shape_are_left_out(tmp_path: Path) -> None:
    keys = [image_key(bytes([number]) * HASH_BYTES, (16, 8)) for number in range(3)]
    tensors = [torch.zeros(VAE.shape((16, 8))), torch.zeros(VAE.shape((16, 8))), torch.zeros(1)]
    write_store(tmp_path, VAE, *({key: tensor} for key, tensor in zip(keys, tensors, strict=True)))
    cut = tmp_path / SHARDS / "shard-1.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    (tmp_path / SHARDS / "shard-3.safetensors").write_bytes(b"abc")
    assert [name for name, _ in read_index(tmp_path, VAE.num_bytes).shards] == ["shard-0.safetensors"]
    damaged = damaged_shards(tmp_path, VAE.num_bytes)
    assert sorted(path.name for path in damaged) == [f"shard-{number}.safetensors" for number in (1, 2, 3)]


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, VAE, {})
    store = LatentStore(tmp_path)
    store.require(Identity(**{**asdict(VAE), "stored": "bfloat16"}))
    with pytest.raises(DataError, match="weights of the VAE: abc in the cache, other here"):
        store.require(Identity(**{**asdict(VAE), "weights": "other"}))
    (tmp_path / IDENTITY).write_text('{"kind": 1}')
    with pytest.raises(DataError, match=r"identity\.json cannot be read"):
        LatentStore(tmp_path)
    with pytest.raises(DataError, match="holds no cache"):
        LatentStore(tmp_path / "nowhere")


def test_outputs_of_a_vision_encoder_have_a_row_a_patch(tmp_path: Path) -> None:
    key = image_key(b"x" * HASH_BYTES, (42, 28))
    outputs = torch.randn(VIT.shape((42, 28))).bfloat16()
    write_store(tmp_path, VIT, {key: outputs})
    found = LatentStore(tmp_path).find(b"x" * HASH_BYTES, (42, 28))
    assert outputs.shape == (6, 6) and found is not None and torch.equal(found, outputs)


def test_a_pack_of_cached_images_is_laid_out_as_one_of_decoded_images() -> None:
    packer = Packer(PackingConfig(0, 1, 2, 3, max_latent_size=8, vit_max_num_patch_per_side=4))
    images = [torch.rand(3, 32, 48), torch.rand(3, 32, 48), torch.rand(3, 28, 14), torch.rand(3, 14, 14)]
    moments, outputs = torch.rand(32, 4, 6), torch.rand(2, 16)

    def sample(cached: bool) -> Sample:
        known = {"encoded": moments, "size": (48, 32)} if cached else {"image": images[0]}
        seen = {"encoded": outputs, "size": (14, 28)} if cached else {"image": images[2]}
        return Sample(
            (
                Segment("vae_image", **known),
                Segment("vit_image", **seen),
                Segment("text", text_ids=(5, 6)),
                Segment("vit_image", image=images[3]),
                Segment("vae_image", image=images[1], loss=True),
                Segment("vae_image", loss=True, **known),
            ),
            seed=7,
        )

    plain, cached = packer.pack([sample(False)]), packer.pack([sample(True)])
    for batch in (plain, cached):
        batch.validate()
    for name in vars(plain):
        if name.startswith(("packed_", "sample_", "split_", "vae_seeds")) and name != "packed_vit_tokens":
            one, other = getattr(plain, name), getattr(cached, name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    assert plain.vae_image_indexes == [0, 1, 0] and plain.vae_moments is None and plain.vit_features is None
    assert cached.vae_image_indexes == [1, 0, 1]
    assert [len(cached.vae_images or ()), len(cached.vae_moments or ())] == [1, 1]
    assert cached.vit_is_encoded == [True, False] and cached.vit_features is not None
    assert cached.packed_vit_tokens is not None and torch.equal(cached.packed_vit_tokens, plain.packed_vit_tokens[2:])
    moved = cached.to("meta")
    assert moved.vae_moments[0].is_meta and moved.vit_features.is_meta
