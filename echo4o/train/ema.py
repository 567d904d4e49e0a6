"""Exponential moving average of what trains, in float32 beside the parameters (or in host memory)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from echo4o.checkpoint.pieces import Piece, flat, piece_of

#: A number of updates after which nothing is left to correct, whatever the decay.
WARMED_UP = 2**40


class EMA:
    """``ema ← decay · ema + (1 − decay) · parameter`` after every update, as upstream.

    With `bias_correction` the average forgets the starting weights: after n updates it is the mean of the n parameter
    values with weights ``decay^(n−k)`` (Adam's correction), so that a short run with a slow decay still ends near its
    own weights. The decay of update n is then ``decay · (1 − decay^(n−1)) / (1 − decay^n)``. An average that was loaded
    (`continue_average`) is continued, not forgotten: the correction counts as over.

    Args:
        trained: name → this process' piece of everything that trains (frozen tensors are their own average); or the
            parameters themselves, where nothing is sharded.
        offload: keep the average in host memory; every update then copies the weights there.

    Raises:
        ValueError: if the decay is not in [0, 1).
    """

    def __init__(
        self, trained: Mapping[str, Piece | Tensor], decay: float, bias_correction: bool = False, offload: bool = False
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"ema is {decay}; the decay must be in [0, 1), e.g. 0.9999 for long and 0.995 for short runs"
            )
        self.decay = decay
        self.bias_correction = bias_correction
        self.num_updates = 0
        self._trained = {
            name: piece_of(value.detach()) if isinstance(value, Tensor) else value for name, value in trained.items()
        }
        self._offload = offload
        self.shadow: dict[str, Tensor] = {
            name: _shaped(piece, piece.values.to("cpu" if offload else piece.values.device, torch.float32, copy=True))
            for name, piece in self._trained.items()
        }

    def current_decay(self) -> float:
        """The decay of update number `num_updates`."""
        if not self.bias_correction:
            return self.decay
        n = max(1, self.num_updates)
        return self.decay * (1 - self.decay ** (n - 1)) / (1 - self.decay**n)

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = self.current_decay()
        averages = [flat(average) for average in self.shadow.values()]
        values = [piece.values.float() for piece in self._trained.values()]
        if self._offload:
            values = [value.cpu() for value in values]
        if averages:
            torch._foreach_mul_(averages, decay)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, values, alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def pieces(self) -> dict[str, Piece]:
        """The average as pieces, laid out as the weights; views, so that filling them loads them."""
        return {
            name: dataclasses.replace(piece, values=flat(self.shadow[name])) for name, piece in self._trained.items()
        }

    def continue_average(self) -> None:
        """The average was loaded (an upstream ``ema.safetensors``): it is nothing to be forgotten."""
        # Saved with the checkpoint, and so kept on resume.
        self.num_updates = max(self.num_updates, WARMED_UP)


def _shaped(piece: Piece, values: Tensor) -> Tensor:
    """A tensor that is here as a whole has its shape; of others there is the run of elements."""
    return values.reshape(piece.shape) if values.numel() == piece.num_elements else values
