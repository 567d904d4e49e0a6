"""The moving average (the reference's own numbers are checked in test_parity_steps)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from echo4o.checkpoint.pieces import Piece, flat
from echo4o.train.ema import EMA


def walk(ema: EMA, parameter: nn.Parameter, values: list[float]) -> None:
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()


def test_plain_average_keeps_its_share_of_the_start() -> None:
    parameter = nn.Parameter(torch.tensor([8.0]))
    ema = EMA({"p": parameter}, decay=0.75)
    walk(ema, parameter, [4.0, 2.0])
    assert ema.shadow["p"].item() == pytest.approx(0.75 * (0.75 * 8 + 0.25 * 4) + 0.25 * 2)


def test_bias_corrected_average_forgets_the_start() -> None:
    parameter = nn.Parameter(torch.tensor([1000.0]))
    ema = EMA({"p": parameter}, decay=0.9, bias_correction=True)
    values = [1.0, 5.0, 2.0, 7.0]
    walk(ema, parameter, values)
    weights = [0.9 ** (len(values) - 1 - k) for k in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert ema.shadow["p"].item() == pytest.approx(expected, rel=1e-6)


def test_average_is_float32_and_apart_from_the_parameter() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA({"p": parameter}, decay=0.5)
    assert ema.shadow["p"].dtype == torch.float32
    walk(ema, parameter, [3.0])
    assert ema.shadow["p"].tolist() == [2.0] * 3 and parameter.tolist() == [3.0] * 3


def test_bias_correction_continues_a_loaded_average() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    ema = EMA({"p": parameter}, decay=0.9, bias_correction=True)
    ema.pieces()["p"].values.fill_(1.0)
    ema.continue_average()
    walk(ema, parameter, [2.0])
    assert ema.shadow["p"].item() == pytest.approx(0.9 * 1 + 0.1 * 2)


def test_average_of_a_share_of_a_tensor() -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    share = Piece((4, 3), 6, flat(tensor)[6:])
    ema = EMA({"p": share}, decay=0.5)
    tensor.add_(2.0)
    ema.update()
    assert ema.shadow["p"].tolist() == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    piece = ema.pieces()["p"]
    assert (piece.shape, piece.start, piece.stop) == ((4, 3), 6, 12)


def test_average_in_host_memory_is_the_same() -> None:
    parameter = nn.Parameter(torch.tensor([8.0, 1.0]))
    one, other = EMA({"p": parameter}, decay=0.75), EMA({"p": parameter}, decay=0.75, offload=True)
    for value in (4.0, 2.0):
        walk(one, parameter, [value])
        other.update()
    assert torch.equal(one.shadow["p"], other.shadow["p"]) and other.shadow["p"].device.type == "cpu"


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="0.995"):
        EMA({}, decay)
