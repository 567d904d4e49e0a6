"""Whole runs on several ranks: the same curve as one process, and the same again after going on with others."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from echo4o.train.metrics import read_metrics
from echo4o.train.row_log import read_rows
from tests.train.launch import train_on
from tests.train.tiny_run import DATA, run_settings, write_bagel

PACKS, STEPS, HALF = 4, 8, 4
SHARED_VALUES = ("loss", "mse", "ce", "grad_norm", "lr", "num_mse_tokens", "data/samples", "data/rows")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="an extra")


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel"))


def settings(bagel: Path, out: Path, ranks: int, **changes: object) -> dict:
    """All kinds of data, of which packs lack some; four packs a step, whatever the ranks."""
    return run_settings(bagel, out, **{
        "dataset_config_file": str(DATA / "dataset_mixed.yaml"),
        "gradient_accumulation_steps": PACKS // ranks,
        "total_steps": STEPS,
        "save_every": HALF,
        "log_rows": True,
        "auto_resume": True,
        **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def whole(bagel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, on one process."""
    out = tmp_path_factory.mktemp("whole")
    train_on(1, settings(bagel, out, 1))
    return out


def assert_same_curve(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    one, other = (read_metrics(out / "metrics.jsonl") for out in (found, expected))
    assert [record["step"] for record in one] == [record["step"] for record in other] == list(range(1, STEPS + 1))
    for mine, theirs in zip(one, other, strict=True):
        for name in SHARED_VALUES:
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance), f"step {mine['step']}, {name}"
    rows, others = read_rows(found), read_rows(expected)
    assert {step: sorted(packs) for step, packs in rows.items()} == {s: sorted(p) for s, p in others.items()}


def assert_resumes(bagel: Path, whole: Path, out: Path, first: int, second: int, **changes: object) -> None:
    train_on(first, settings(bagel, out, first, total_steps=HALF, **changes))
    train_on(second, settings(bagel, out, first, num_workers=2, **changes))  # accumulation follows the ranks
    assert_same_curve(out, whole)


def test_two_ranks_go_on_as_one(bagel: Path, whole: Path, tmp_path: Path) -> None:
    assert_resumes(bagel, whole, tmp_path, 2, 1)


def test_one_process_goes_on_as_two_ranks_of_another_strategy(bagel: Path, whole: Path, tmp_path: Path) -> None:
    assert_resumes(bagel, whole, tmp_path, 1, 2, sharding_strategy="NO_SHARD", async_save=False)


@needs_deepspeed
def test_fsdp_goes_on_as_deepspeed(bagel: Path, whole: Path, tmp_path: Path) -> None:
    train_on(1, settings(bagel, tmp_path, 1, total_steps=HALF))
    train_on(2, settings(bagel, tmp_path, 1, engine="deepspeed", zero_stage=2))
    assert_same_curve(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("second", [1, 2, 4])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_resume_matrix(bagel: Path, whole: Path, tmp_path: Path, first: int, second: int) -> None:
    assert_resumes(bagel, whole, tmp_path, first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(2, "SHARD_GRAD_OP"), (2, "NO_SHARD"), (4, "HYBRID_SHARD"), (4, "_HYBRID_SHARD_ZERO2"), (4, "FULL_SHARD")],
)
def test_every_strategy(bagel: Path, whole: Path, tmp_path: Path, ranks: int, strategy: str) -> None:
    mesh = {"num_replicate": 2, "num_shard": 2} if "HYBRID" in strategy else {}
    train_on(ranks, settings(bagel, tmp_path, ranks, sharding_strategy=strategy, **mesh))
    assert_same_curve(tmp_path, whole)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deepspeed_goes_on_with_the_same_ranks(
    bagel: Path, whole: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    assert_resumes(bagel, whole, tmp_path, ranks, ranks, engine="deepspeed", zero_stage=stage)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_goes_on_as_fsdp_with_other_ranks(bagel: Path, whole: Path, tmp_path: Path) -> None:
    train_on(4, settings(bagel, tmp_path, 4, total_steps=HALF, engine="deepspeed", zero_stage=3))
    train_on(2, settings(bagel, tmp_path, 4))
    assert_same_curve(tmp_path, whole)


@pytest.mark.slow
def test_other_packs_a_step_lose_and_repeat_no_row(bagel: Path, tmp_path: Path) -> None:
    train_on(2, settings(bagel, tmp_path, 2, total_steps=HALF))
    train_on(1, settings(bagel, tmp_path, 2, keep_packs_per_step=False, gradient_accumulation_steps=3))
    rows = read_rows(tmp_path)
    assert [len(packs) for packs in rows.values()] == [4] * HALF + [3] * (STEPS - HALF)
    seen = [tuple(address) for packs in rows.values() for pack in packs for address in pack]
    assert len(seen) == len(set(seen))
