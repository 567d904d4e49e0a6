"""FSDP2 on one, two and four ranks equals a plain loop in one process, whatever the strategy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from echo4o.checkpoint.pieces import Piece, flat, whole
from echo4o.train.engine.fsdp import mesh_shape
from tests.train.engine import zero_process
from tests.train.engine.fsdp_process import LR, SCENARIOS, STEPS
from tests.train.engine.zero_process import plain_steps
from tests.train.launch import launch

# Attention does not depend on this bias: its gradient is rounding noise, which AdamW enlarges to whole updates.
NOISE = "k_proj.bias"
ON_TWO = ("full", "grad_op", "hybrid_zero2", "none")


@pytest.fixture(scope="module")
def plain() -> Iterator[dict[bool, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_process, "LR", LR)
        yield {tied: plain_steps(STEPS, tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("fsdp2"), 2, ON_TWO)


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("fsdp4"), 4, ("hybrid",))


def launched(folder: Path, num_ranks: int, names: tuple[str, ...]) -> Path:
    launch(num_ranks, "tests.train.engine.fsdp_process:run", {"folder": str(folder), "names": names})
    return folder


def check(folder: Path, name: str, plain: dict[bool, dict[str, Any]], tolerance: float = 1e-5) -> dict[str, Any]:
    found = torch.load(folder / f"{name}.pt", weights_only=False)
    expected = plain[SCENARIOS[name].get("tied", False)]
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert [norm for norm in found["norms"] if math.isfinite(norm)] == pytest.approx(expected["norms"], rel=tolerance)
    for key, tensor in found["weights"].items():
        if NOISE not in key:
            torch.testing.assert_close(tensor, expected["weights"][key], rtol=1e-3, atol=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    assert found["same_storage"], "pieces are views for the whole run"
    assert sum(found["num_owned"]) == sum(expected["weights"][key].numel() for key in found["names"][0])
    return found


@pytest.mark.parametrize("name", ON_TWO)
def test_ten_steps_on_two_ranks_equal_one_process(name: str, on_two_ranks: Path, plain) -> None:
    found = check(on_two_ranks, name, plain)
    if name == "full":
        assert math.isnan(found["norms"][1]), "the steps after it show that nothing was changed"
        assert min(found["num_owned"]) > 0.4 * sum(found["num_owned"]), "each rank holds about half"
    if name == "none":
        assert found["num_owned"][1] == 0, "of two replicas one writes"


def test_ten_steps_on_four_ranks_equal_one_process(on_four_ranks: Path, plain) -> None:
    found = check(on_four_ranks, "hybrid", plain)
    assert found["num_owned"][0] and found["num_owned"][2] == 0, "of two replicas one writes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [
        (1, ("full", "none", "offload", "values")),
        (2, ("full_selective", "tied", "offload", "values")),
        (4, ("full", "grad_op", "none", "tied", "values", "offload", "hybrid_zero2")),
    ],
)
def test_further_strategies_and_ranks(num_ranks: int, names: tuple[str, ...], tmp_path: Path, plain) -> None:
    launched(tmp_path, num_ranks, names)
    for name in names:
        check(tmp_path, name, plain)


@pytest.mark.slow
def test_bfloat16_products_stay_near(tmp_path: Path, plain) -> None:
    found = torch.load(launched(tmp_path, 2, ("bf16",)) / "bf16.pt", weights_only=False)
    assert found["losses"] == pytest.approx(plain[False]["losses"], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in found["weights"].values())


@pytest.mark.parametrize(
    ("world", "asked", "used"),
    [(8, (1, 8), (1, 8)), (4, (1, 8), (1, 4)), (6, (1, 8), (1, 6)), (16, (1, 8), (2, 8)), (6, (1, 4), (2, 3)),
     (8, (4, 2), (4, 2)), (1, (1, 8), (1, 1)), (7, (2, 4), (7, 1))],
)  # fmt: skip
def test_a_mesh_for_every_number_of_ranks(world: int, asked: tuple[int, int], used: tuple[int, int]) -> None:
    assert mesh_shape(world, *asked) == used


def test_pieces_are_views_of_contiguous_tensors() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    piece = whole(tensor)
    piece.values[4] = 40.0
    assert tensor[1, 1] == 40.0 and (piece.start, piece.stop, piece.num_elements) == (0, 6, 6)
    assert Piece((), 0, flat(torch.tensor(1.0))).num_elements == 1
    with pytest.raises(ValueError, match="not contiguous"):
        whole(tensor.T)
