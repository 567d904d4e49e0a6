"""Exponential moving average of what trains, in float32 beside the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: A number of updates after which nothing is left to correct, whatever the decay.
WARMED_UP = 2**40


class EMA:
    """``ema ← decay · ema + (1 − decay) · parameter`` after every update, as upstream.

    With `bias_correction` the average forgets the starting weights: after n updates it is the mean of the n parameter
    values with weights ``decay^(n−k)`` (Adam's correction), so that a short run with a slow decay still ends near its
    own weights. The decay of update n is then ``decay · (1 − decay^(n−1)) / (1 − decay^n)``. An average that was loaded
    (`load_average`) is continued, not forgotten: the correction counts as over.

    Args:
        parameters: name → parameter of everything that trains (frozen tensors are their own average).

    Raises:
        ValueError: if the decay is not in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, bias_correction: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"ema is {decay}; the decay must be in [0, 1), e.g. 0.9999 for long and 0.995 for short runs"
            )
        self.decay = decay
        self.bias_correction = bias_correction
        self.num_updates = 0
        self._parameters = dict(parameters)
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
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
        averages = list(self.shadow.values())
        values = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_mul_(averages, decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, values, alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def load_average(self, weights: Mapping[str, Tensor]) -> None:
        """Continue an average (an upstream ``ema.safetensors``); names that do not train are ignored."""
        # Saved with the checkpoint, and so kept on resume.
        self.num_updates = max(self.num_updates, WARMED_UP)
        for name, value in weights.items():
            if name in self.shadow:
                self.shadow[name].copy_(value)
