"""Whole tensors from pieces, on rank 0: for small models and tests. Checkpoints never need them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from echo4o.checkpoint.pieces import Piece
from echo4o.train.processes import Processes


def consolidate(processes: Processes, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Whole CPU tensors on rank 0, an empty dictionary elsewhere; one tensor is on its way at a time. Collective."""
    whole: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        run = (piece.start, piece.values.cpu().clone()) if piece.owned else None
        runs = processes.gather(run)
        if processes.rank == 0:
            elements = torch.empty(piece.num_elements, dtype=piece.values.dtype)
            for start, values in (run for run in runs if run is not None):
                elements[start : start + len(values)] = values
            whole[name] = elements.reshape(piece.shape)
    return whole
