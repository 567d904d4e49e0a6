"""DeepSpeed on one and two ranks equals a plain loop in one process; settings from flags and file.

The scenarios run in processes of their own (`tests.train.engine.zero_process`), several in one start.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echo4o.config import ConfigError
from echo4o.train.engine.deepspeed import DeepSpeedEngine
from echo4o.train.engine.deepspeed_config import ZeroSettings, zero_settings
from echo4o.train.processes import Processes
from tests.train.engine.zero_process import SCENARIOS, plain_steps, run_zero, tiny_weights

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="an extra")
# Attention does not depend on this bias: its gradient is rounding noise, which AdamW enlarges to whole updates.
NOISE = "k_proj.bias"
#: A hundredth of one update: what rounding leaves of gradients that nearly vanish.
UPDATE_NOISE = 1e-4


@pytest.fixture(scope="session")
def plain() -> dict[str, Any]:
    return plain_steps()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, plain: dict[str, Any]) -> Path:
    """Where the processes of all tests leave what they found."""
    folder = tmp_path_factory.mktemp("zero")
    torch.save(plain, folder / "plain.pt")
    return folder


@pytest.fixture(scope="session")
def on_two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return run_zero(folder, ["zero1", "zero2", "zero3", "zero3_from_plain"], world_size=2)


def assert_steps_equal(
    found: dict[str, Any], expected: dict[str, Any], first: int = 0, tolerance: float = 1e-5
) -> None:
    finite = [norm for norm in found["norms"] if math.isfinite(norm)]
    assert found["losses"] == pytest.approx(expected["losses"][first:], rel=tolerance)
    assert finite == pytest.approx(expected["norms"][first:], rel=tolerance)


def assert_tensors_equal(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if NOISE not in name:
            torch.testing.assert_close(
                found[name].float(), tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---------------------------------------------------------------- the default run


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_from_plain"])
def test_losses_norms_and_weights_equal_one_process(name: str, on_two_ranks, plain) -> None:
    found = on_two_ranks[name]
    assert_steps_equal(found, plain, SCENARIOS[name].first)
    assert_tensors_equal(found["weights"], plain["weights"], atol=UPDATE_NOISE)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_norm_that_is_not_finite_leaves_everything_as_it_was(name: str, on_two_ranks) -> None:
    assert math.isnan(on_two_ranks[name]["norms"][1])  # the steps after it: see the test above


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_pieces_are_views_that_last_and_each_element_has_one_owner(name: str, on_two_ranks, plain) -> None:
    found = on_two_ranks[name]
    assert found["same_storage"]
    trained, frozen = found["names"]
    assert sum(found["num_owned"]) == sum(plain["weights"][name].numel() for name in trained)
    assert min(found["num_owned"]) > 0.4 * sum(found["num_owned"])
    assert sorted(trained + frozen) == sorted(plain["weights"])
    assert_tensors_equal(found["at_first"], tiny_weights(), atol=0.0)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_optimizer_slots_and_step_counts_equal_one_process(name: str, on_two_ranks, plain) -> None:
    state = on_two_ranks[name]["state"]
    assert state["steps"] == plain["state"]["steps"]
    assert_tensors_equal(state["slots"], plain["state"]["slots"], atol=1e-6)
    assert_tensors_equal(state["trained"], plain["state"]["trained"], atol=UPDATE_NOISE)


@needs_deepspeed
def test_stage_3_gives_all_weights_back(on_two_ranks) -> None:
    assert on_two_ranks["zero3"]["num_gathered"] == 0
    assert on_two_ranks["zero2"]["num_gathered"] == 1


@needs_deepspeed
def test_the_state_of_two_ranks_with_stage_2_goes_on_in_one_with_stage_3(folder, on_two_ranks, plain) -> None:
    found = run_zero(folder, ["zero3_from_zero2"], world_size=1)["zero3_from_zero2"]
    assert_steps_equal(found, plain, first=2)
    assert_tensors_equal(found["weights"], plain["weights"], atol=UPDATE_NOISE)
    assert found["eval_loss"] == pytest.approx(on_two_ranks["zero3"]["eval_loss"], rel=1e-5)


# ---------------------------------------------------------------- the rest of the matrix

MATRIX = {
    "one rank": (1, ["zero1", "zero2", "zero3", "zero1_from_plain"]),
    "other bucket sizes": (2, ["zero1_large", "zero2_small", "zero3_small"]),
    "recomputation": (2, ["zero3_full", "zero3_selective"]),
    "transfers": (2, ["zero2_from_zero3", "zero3_from_zero2", "zero1_from_plain"]),
    "a model with its values": (2, ["zero1_values", "zero2_values", "zero3_values"]),
    "offload": (2, ["zero1_offload", "zero2_offload", "zero3_offload"]),
    "offload, small buckets": (2, ["zero1_large_offload", "zero2_large_offload", "zero3_large_offload"]),
    "four ranks": (4, ["zero2", "zero3"]),
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("row", MATRIX)
def test_every_way_equals_one_process(row: str, folder, on_two_ranks, plain) -> None:
    world_size, names = MATRIX[row]
    for name, found in run_zero(folder, names, world_size).items():
        assert_steps_equal(found, plain, SCENARIOS[name].first)
        assert_tensors_equal(found["weights"], plain["weights"], atol=UPDATE_NOISE)
        assert found["same_storage"], name


@needs_deepspeed
@pytest.mark.slow
def test_tied_word_embeddings(folder) -> None:
    expected = plain_steps(tied=True)
    for found in run_zero(folder, ["zero1_tied", "zero2_tied", "zero3_tied"], world_size=2).values():
        assert_steps_equal(found, expected)
        assert_tensors_equal(found["weights"], expected["weights"], atol=UPDATE_NOISE)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "bf16_values"])
def test_bfloat16_has_exact_masters_and_follows_float32(kind: str, folder, plain) -> None:
    names = [f"zero{stage}_{kind}" for stage in (1, 2, 3)] + ["zero3_bf16_reduce"] * (kind == "bf16")
    weights = tiny_weights()
    for found in run_zero(folder, names, world_size=2).values():
        trained, _ = found["names"]
        assert all(found["at_first"][name].equal(weights[name]) for name in trained)
        assert_steps_equal(found, plain, tolerance=1e-2)
        assert found["same_storage"]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="Bagel calls lm_head once a chunk: more often on one rank than on another")
def test_ranks_may_have_different_numbers_of_cross_entropy_chunks(folder, plain) -> None:
    assert_steps_equal(run_zero(folder, ["zero3_chunks"], world_size=2)["zero3_chunks"], plain)


# ---------------------------------------------------------------- settings


def settings_of(tmp_path: Path, given: Any = None, **flags: Any) -> ZeroSettings:
    path = None
    if given is not None:
        path = tmp_path / "zero.json"
        path.write_text(given if isinstance(given, str) else json.dumps(given))
    ours: dict[str, Any] = {
        "zero_stage": 3,
        "cpu_offload": False,
        "compute_dtype": torch.bfloat16,
        "reduce_dtype": torch.float32,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "world_size": 4,
        "on_gpu": True,
    }
    return zero_settings(path, **ours | flags)


def test_without_a_file_the_flags_count(tmp_path) -> None:
    settings = settings_of(tmp_path, zero_stage=2, reduce_dtype=torch.bfloat16)
    assert (settings.stage, settings.config["zero_optimization"]["stage"]) == (2, 2)
    assert settings.config["bf16"] == {"enabled": True}
    assert settings.config["communication_data_type"] == "bf16"
    assert settings.config["gradient_accumulation_steps"] == 2
    assert not settings.notes and not settings.offloads_optimizer


def test_the_file_counts_where_it_says_something(tmp_path) -> None:
    zero = {
        "stage": 2,
        "reduce_bucket_size": 5e7,
        "allgather_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
    }
    given = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto"}
    settings = settings_of(tmp_path, given | {"communication_data_type": "bf16", "wall_clock_breakdown": False})
    assert settings.stage == 2 and settings.offloads_optimizer and not settings.offloads_weights
    assert settings.config["zero_optimization"]["reduce_bucket_size"] == 5e7
    assert settings.config["zero_optimization"]["allgather_bucket_size"] == 100_000_000
    assert settings.config["bf16"]["enabled"] is True
    assert settings.config["communication_data_type"] == "bf16"
    assert "stage 2" in settings.notes[0] and "--zero_stage 3" in settings.notes[0]


def test_offload_of_the_flags_covers_weights_with_stage_3(tmp_path) -> None:
    settings = settings_of(tmp_path, cpu_offload=True)
    assert settings.offloads_optimizer and settings.offloads_weights
    assert settings.config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert not settings_of(tmp_path, cpu_offload=True, zero_stage=2).offloads_weights
    assert "changes nothing" in settings_of(tmp_path, cpu_offload=True, on_gpu=False).notes[0]


def test_what_is_ours_is_left_out_and_said(tmp_path) -> None:
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 1}}, "scheduler": {"type": "WarmupLR"}, "wandb": {}}
    settings = settings_of(tmp_path, given)
    assert "optimizer" not in settings.config and "scheduler" not in settings.config
    assert [note.split()[0] for note in settings.notes] == ["optimizer", "scheduler"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "not valid JSON"),
        ([], "holds a list"),
        ({"zero_optimization": 3}, "must be an object"),
        ({"zero_optimization": {"stage": 0}}, "choose 1"),
        ({"zero_optimization": {"stage": "3"}}, "choose 1"),
        ({"pipeline": {"stages": 2}}, "pipeline in .* not supported: remove it"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"fp16": {"enabled": True}}, "fp16 .* use \"bf16\""),
        ({"bf16": {"enabled": False}}, "--dtype float32"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states"),
        ({"gradient_accumulation_steps": 8}, "--gradient_accumulation_steps, which is 2: set it to \"auto\""),
        ({"train_batch_size": 64}, "packs × ranks a step, which is 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "--expected_num_tokens"),
        ({"gradient_clipping": 0.5}, "--max_grad_norm, which is 1.0"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"cpu_offload": True}}, "use offload_optimizer"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "Use \"cpu\""),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_remedy(given, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, given)


def test_what_agrees_or_is_off_is_accepted(tmp_path) -> None:
    given = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "gradient_predivide_factor": 1.0,
        "prescale_gradients": False,
        "fp16": {"enabled": False, "loss_scale": 0},
        "flops_profiler": {"enabled": False},
        "bf16": {"enabled": True},
    }
    assert settings_of(tmp_path, given).config["gradient_clipping"] == 0.0


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cannot read deepspeed_config {tmp_path / 'no.json'}")):
        DeepSpeedEngine(Processes(), torch.device("cpu"), torch.float32, config_file=tmp_path / "no.json")


def test_without_deepspeed_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ConfigError, match=r"pip install 'echo4o\[deepspeed\]'"):
        DeepSpeedEngine(Processes(), torch.device("cpu"), torch.float32)
