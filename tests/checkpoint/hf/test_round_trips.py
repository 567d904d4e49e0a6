"""Any tiny model, any kind of checkpoint, any layout: exported, loaded in a fresh process, it computes the same."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from echo4o.checkpoint.hf.command import ExportRequest, run_export
from echo4o.checkpoint.hf.probe import probe_outputs
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.model import Bagel
from tests.checkpoint.hf.checkpoints import FOREIGN, RUNS, Made, make, random_config
from tests.checkpoint.hf.drawn import drawn_picture

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = ("both", "bagel", "hf")
DTYPES = ("float32", "bfloat16", "auto")


@dataclass
class Case:
    made: Made
    out: Path
    layout: str
    dtype: str


def make_cases(root: Path, seed: int, count: int) -> list[Case]:
    """Each kind, layout and dtype comes up as evenly as `count` allows."""
    rng, cases = random.Random(seed), []
    kinds = [*RUNS, *FOREIGN]
    for number in range(count):
        place = root / str(number)
        place.mkdir()
        kind, weights = kinds[number % len(kinds)], rng.choice(("ema", "model"))
        made = make(kind, place, random_config(rng), seed * 1000 + number, weights)
        layout, dtype = LAYOUTS[number % len(LAYOUTS)], DTYPES[number // 2 % len(DTYPES)]
        out = place / "out" / f"my-{kind}"
        request = ExportRequest(
            made.folder, out, layout, weights if kind in RUNS else None, dtype, made.base, max_shard_size="60KB"
        )
        run_export(request, say=lambda text: None)
        cases.append(Case(made, out, layout, dtype))
    return cases


@torch.no_grad()
def rounded(model: Bagel, dtype: str) -> Bagel:
    """As the export holds it, in float32 again."""
    model = copy.deepcopy(model)
    if dtype == "bfloat16":
        for tensor in model.state_dict(keep_vars=True).values():  # tables of rotations are no parameters
            tensor.copy_(tensor.to(torch.bfloat16))
    return model


#: Adapters are added in another order of operations than in the test, before rounding to the export's dtype.
ADAPTED = 2e-2
#: transformers places weights in memory at other alignments, which changes the last bit of products.
REMOTE = 1e-5


def same(found: dict, wanted: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def check(root: Path, seed: int, count: int) -> None:
    cases = make_cases(root, seed, count)
    listed = [{"folder": str(case.out), "remote": case.layout != "bagel"} for case in cases]
    (root / "cases.json").write_text(json.dumps(listed))
    command = [
        sys.executable,
        "-m",
        "tests.checkpoint.hf.load_exports",
        str(root / "cases.json"),
        str(root / "found.pt"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    found = torch.load(root / "found.pt")
    for case in cases:
        entry, exactly = found[str(case.out)], "lora" not in case.out.name
        model = rounded(case.made.model, case.dtype)
        wanted = probe_outputs(model)
        same(entry["outputs"], wanted, 0.0 if exactly else ADAPTED)
        picture = drawn_picture(Echo4oPipeline.around(model, case.out, device="cpu"))
        if picture is None:
            assert entry["picture"] is None
        elif exactly:
            assert torch.equal(entry["picture"], picture)
        else:
            assert (entry["picture"].int() - picture.int()).abs().max() <= 3
        if case.layout != "bagel":
            assert not any(entry["report"].values()), entry["report"]
            same(entry["remote"], entry["outputs"], REMOTE)
            assert picture is None or (entry["remote_picture"].int() - entry["picture"].int()).abs().max() <= 1


def test_a_few(tmp_path: Path) -> None:
    check(tmp_path, seed=0, count=9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many(tmp_path: Path, seed: int) -> None:
    check(tmp_path, seed, count=24)
