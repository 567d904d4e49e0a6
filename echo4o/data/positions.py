"""Patches and their place in the two-dimensional position tables, for ViT patches and latent patches alike."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from echo4o.data.errors import GridError

#: torch.arange computes this many float32 numbers from one base; see `_float32_range`.
_ARANGE_VECTOR = 8


def position_ids(height: int, width: int, patch: int, max_per_side: int, interpolate: bool = False) -> Tensor:
    """Index of every patch of an image into a ``max_per_side`` × ``max_per_side`` table, row by row.

    Args:
        height, width: of the image in pixels.
        patch: pixels a patch side (14 for the ViT; latent_downsample, 16, for latents).
        max_per_side: entries a side of the table.
        interpolate: spread the patches over the whole table instead of its upper left corner.

    Returns:
        (height // patch · width // patch,) int64.

    Raises:
        GridError: if the image has more patches a side than the table and positions are not interpolated.
    """
    rows, columns = height // patch, width // patch
    if interpolate:
        row_ids = torch.from_numpy(interpolated_buckets(rows, max_per_side))
        column_ids = torch.from_numpy(interpolated_buckets(columns, max_per_side))
    else:
        check_grid(height, width, patch, max_per_side)
        row_ids, column_ids = torch.arange(rows), torch.arange(columns)
    return (row_ids[:, None] * max_per_side + column_ids).flatten()


def check_grid(height: int, width: int, patch: int, max_per_side: int) -> None:
    """Refuse an image whose patch grid does not fit the position table.

    Raises:
        GridError: naming the grid, the table and the remedy.
    """
    rows, columns = height // patch, width // patch
    if max(rows, columns) > max_per_side:
        raise GridError(
            "grid too large",
            detail=f"an image of {width} × {height} px has {columns} × {rows} patches of {patch} px, but the position "
            f"table holds {max_per_side} × {max_per_side}; lower max_image_size to {max_per_side * patch}",
        )


def interpolated_buckets(num_patches: int, max_per_side: int) -> np.ndarray:
    """Table row of each of `num_patches` patches spread over `max_per_side` rows: (num_patches,) int64.

    Upstream buckets ``torch.arange(0, 1 - 1e-6, 1/n)`` by the boundaries ``arange(1/max, 1, 1/max)`` in float32, so the
    result near ties depends on how arange rounds. That recipe is written out here, to hold on every machine.
    """
    coordinates = _float32_range(0.0, 1 - 1e-6, 1 / num_patches)
    boundaries = _float32_range(1 / max_per_side, 1.0, 1 / max_per_side)
    return np.searchsorted(boundaries, coordinates, side="right").astype(np.int64)


def _float32_range(start: float, end: float, step: float) -> np.ndarray:
    """What ``torch.arange`` gives in float32: vectors of eight are a float32 base plus float64 multiples of the step;
    vectors come in pairs, and what is left over is rounded number by number."""
    length = math.ceil((end - start) / step)
    index = np.arange(length)
    in_vector = index % _ARANGE_VECTOR
    base = (start + (index - in_vector) * step).astype(np.float32).astype(np.float64)
    values = (base + in_vector * step).astype(np.float32)
    tail = length - length % (2 * _ARANGE_VECTOR)
    values[tail:] = (start + index[tail:] * step).astype(np.float32)
    return values


def patchify_image(image: Tensor, patch: int) -> Tensor:
    """Cut an image into flat patches, row by row; within a patch row-in-patch, column-in-patch, channel.

    Args:
        image: (channels, height, width), sides multiples of `patch`.

    Returns:
        (height // patch · width // patch, patch · patch · channels).
    """
    channels, height, width = image.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {width} × {height} px cannot be cut into patches of {patch} px")
    grid = image.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)
