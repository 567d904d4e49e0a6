"""Position ids and patches against the reference's."""

import json
import platform

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from echo4o.data.errors import GridError, RowError
from echo4o.data.positions import check_grid, interpolated_buckets, patchify_image, position_ids


def test_position_ids_are_the_references(parity):
    golden = load_file(parity / "pure" / "pure.safetensors")
    for case in json.loads((parity / "pure" / "pure.json").read_text())["position_ids"]:
        arguments = (case["img_h"], case["img_w"], case["patch"], case["max_per_side"])
        assert torch.equal(position_ids(*arguments, interpolate=True), golden[case["interpolate"]])
        if max(case["img_h"], case["img_w"]) // case["patch"] <= case["max_per_side"]:
            assert torch.equal(position_ids(*arguments), golden[case["extrapolate"]])


def test_interpolated_buckets_are_the_references(parity):
    checks = json.loads((parity / "extra" / "interpolate_pos" / "outputs.json").read_text())["reference_checks"]
    for max_per_side, rows in checks["interpolated_bucket_of_patch_k"].items():
        for num_patches, buckets in rows.items():
            expected = [int(bucket) for bucket in buckets.split()]
            assert interpolated_buckets(int(num_patches), int(max_per_side)).tolist() == expected
    near_ties = checks["rows_differing_from_floor(k*max/n) [max, n, k, reference, floor]"]
    for max_per_side, num_patches, patch, expected, floor in near_ties:
        assert interpolated_buckets(num_patches, max_per_side)[patch] == expected != floor


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch.arange rounds differently there")
@given(st.integers(1, 200), st.integers(1, 100))
def test_interpolated_buckets_are_those_of_torch(num_patches, max_per_side):
    coordinates = torch.arange(0, 1 - 1e-6, 1 / num_patches)
    boundaries = torch.arange(1 / max_per_side, 1, 1 / max_per_side)
    buckets = interpolated_buckets(num_patches, max_per_side)
    assert np.array_equal(buckets, torch.bucketize(coordinates, boundaries, right=True).numpy())
    assert buckets.min() >= 0 and buckets.max() < max_per_side


def test_a_grid_beyond_the_table_is_refused_unless_interpolated():
    with pytest.raises(GridError, match="lower max_image_size to 64") as caught:
        position_ids(32, 80, 16, 4)
    assert isinstance(caught.value, RowError) and caught.value.reason == "grid too large"
    check_grid(64, 64, 16, 4)
    assert position_ids(32, 80, 16, 4, interpolate=True).max() < 16


def test_patches_are_in_the_references_order(parity):
    golden = load_file(parity / "pure" / "pure.safetensors")
    assert torch.equal(patchify_image(golden["patchify/in"], 14), golden["patchify/out_14"])


def test_vit_tokens_of_a_pack_are_patchified_images(parity):
    folder = parity / "multiref"
    samples, images = json.loads((folder / "samples.json").read_text()), load_file(folder / "samples.safetensors")
    vit_images = []
    for sample in samples:
        segments = [item["type"] for item in sample["sequence_plan"] if item["type"] != "text"]
        pairs = zip(segments, sample["image_keys"], strict=True)
        vit_images += [images[key] for kind, key in pairs if kind == "vit_image"]
    tokens = torch.cat([patchify_image(image, 14) for image in vit_images])
    assert torch.equal(tokens, load_file(folder / "batch.safetensors")["packed_vit_tokens"])


def test_patchify_refuses_ragged_images():
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify_image(torch.zeros(3, 28, 30), 14)
