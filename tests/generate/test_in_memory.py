"""Our model around tensors that another library holds (see also tests/checkpoint/hf/test_remote_code.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from echo4o.generate.in_memory import shared_bagel
from echo4o.model import Bagel
from tests.train.tiny_run import tiny_config


def values(folder: Path) -> dict:
    tiny_config().save_pretrained(folder)
    llm, vit = (json.loads((folder / f"{part}_config.json").read_text()) for part in ("llm", "vit"))
    return json.loads((folder / "config.json").read_text()) | {"llm_config": llm, "vit_config": vit}


def test_tensors_and_their_flags_are_shared(tmp_path: Path) -> None:
    model = Bagel(tiny_config())
    model.vae2llm.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shared = shared_bagel(model.state_dict(keep_vars=True), values(tmp_path))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with torch.no_grad():
        model.llm2vae.weight.fill_(3.0)
    assert shared.llm2vae.weight is model.llm2vae.weight and (shared.llm2vae.weight == 3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"vae2llm.lora_A.default.weight": torch.ones(1)}), "merge_and_unload"),
        (lambda state: state.update({"vae2llm.bias": state["vae2llm.bias"].to("meta")}), "vae2llm.bias is not in"),
        (lambda state: state.pop("vae2llm.bias"), "lacks 1 of"),
    ],
)
def test_models_that_cannot_be_shared(tmp_path: Path, change, message: str) -> None:
    state = dict(Bagel(tiny_config()).state_dict(keep_vars=True))
    change(state)
    with pytest.raises(ValueError, match=message):
        shared_bagel(state, values(tmp_path))
