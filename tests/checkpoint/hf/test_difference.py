"""Comparing two models: what changed, where, by how much, and what is no change at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo4o.checkpoint.adapters import load_bagel
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf import difference as room
from echo4o.checkpoint.hf.changes import Difference
from echo4o.checkpoint.hf.difference import diff, difference_json, difference_text
from echo4o.checkpoint.weights import write_weights
from tests.checkpoint.hf.folders import LAYER, LAYOUTS, adapter, bagel, checkpoint, hf

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
TABLE = "latent_pos_embed.pos_embed"
GEN = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A model's, in float32."""
    folder = bagel(tmp_path_factory.mktemp("model") / "folder")
    state = {name: tensor.float() for name, tensor in load_file(folder / "ema.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    return {
        n: t if "pos_embed.pos" in n else t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in state.items()
    }


@pytest.fixture
def compare(tensors, tmp_path) -> Callable[..., Difference]:
    """Compare the model with a changed copy."""

    def compared(change: Callable[[dict[str, Tensor]], object], swap: bool = False) -> Difference:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for file, content in zip(files, (tensors, changed), strict=True):
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
        return diff(*reversed(files)) if swap else diff(*files)

    return compared


def answer_of(difference: Difference) -> str:
    return json.loads(difference_json(difference))["answer"]


def test_nothing_differs(compare, tensors) -> None:
    found = compare(lambda state: None)
    assert found.is_equal and f"nothing differs: all {len(tensors)} tensors are equal." in difference_text(found)
    assert json.loads(difference_json(found))["equal"] is True


@pytest.mark.parametrize("chunk", [7, 1 << 19])
def test_figures_of_a_tensor(compare, tensors, monkeypatch, chunk) -> None:
    """Against torch on the whole tensor, in chunks that do not fit rows too."""
    monkeypatch.setattr(room, "_CHUNK_ELEMENTS", chunk)
    change = torch.zeros_like(tensors["vae2llm.weight"])
    change.view(-1)[::3] = 0.25 * torch.randn(len(change.view(-1)[::3]), generator=torch.Generator().manual_seed(1))
    found = compare(lambda state: state["vae2llm.weight"].add_(change))
    (entry,) = found.different
    a = tensors["vae2llm.weight"].double()
    delta = (tensors["vae2llm.weight"] + change).double() - a
    assert (entry.name, entry.part, entry.dtype_a) == ("vae2llm.weight", "latent heads", "float32")
    assert entry.max == pytest.approx(delta.abs().max().item(), rel=1e-5)
    assert entry.rms == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-5)
    assert entry.rms_a == pytest.approx(a.square().mean().sqrt().item(), rel=1e-5)
    assert entry.relative == pytest.approx(entry.rms / entry.rms_a)
    assert entry.share == pytest.approx((delta != 0).double().mean().item())
    part = found.parts()[0]
    whole = torch.cat([tensors[n].flatten().double() for n in tensors if n.startswith(("time_", "vae2llm", "llm2vae"))])
    assert (part.part, part.num_different, part.num_tensors) == ("latent heads", 1, 8)
    assert part.relative == pytest.approx((delta.norm() / whole.norm()).item(), rel=1e-4)


def test_the_answer_names_the_parts(compare, tensors) -> None:
    experts = [name for name in tensors if "moe_gen" in name]
    found = compare(lambda state: [state[name].add_(0.1) for name in experts])
    assert answer_of(found) == (f"{len(experts)} of {len(tensors)} tensors differ: all of them generation experts.")
    found = compare(lambda state: [state[name].mul_(1.1) for name in (*experts, "connector.fc1.weight")])
    assert answer_of(found).endswith(f"differ: generation experts ({len(experts)}), connector (1).")
    found = compare(lambda state: state[GEN].mul_(1.1))
    assert answer_of(found) == f"1 of {len(tensors)} tensors differs: one of the generation experts."


def test_largest_first_and_no_more_than_asked_for(compare) -> None:
    found = compare(
        lambda state: [state[GEN].mul_(1.5), state["connector.fc1.weight"].mul_(1.2), state[HEAD].mul_(1.1)]
    )
    assert [entry.name for entry in found.different] == [GEN, "connector.fc1.weight", HEAD]
    text = difference_text(found, limit=1)
    assert GEN in text and HEAD not in text and "and 2 more" in text
    assert GEN not in difference_text(found, limit=0)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, None])
def test_rounding_is_announced_and_is_no_training(compare, tensors, dtype, stored, swap) -> None:
    found = compare(lambda state: state.update({n: t.to(dtype).to(stored or dtype) for n, t in state.items()}), swap)
    name = str(dtype).removeprefix("torch.")
    assert not found.different and found.rounded and not found.is_equal
    assert {entry.rounded for entry in found.rounded} == {name}
    assert answer_of(found).startswith(f"equal up to {name} rounding")


def test_training_smaller_than_rounding_is_training(compare) -> None:
    found = compare(lambda state: state[GEN].mul_(1 + 1e-5))
    assert [entry.name for entry in found.different] == [GEN]


def test_tables_give_no_false_alarm(compare, tensors) -> None:
    assert compare(lambda state: state.pop(TABLE)).is_equal
    assert compare(lambda state: state.pop(TABLE), swap=True).is_equal
    found = compare(lambda state: state.update({TABLE: state[TABLE] + 1e-6}))
    assert found.is_equal and "1 position table in another precision" in answer_of(found)
    found = compare(lambda state: state[TABLE].mul_(1.5))
    assert answer_of(found) == f"1 of {len(tensors)} tensors differs: one of the position tables."


@pytest.mark.parametrize("kept", [HEAD, EMBEDDING])
@pytest.mark.parametrize("swap", [False, True])
def test_tied_embeddings_under_one_name(tmp_path, tensors, kept, swap) -> None:
    tied = tensors | {HEAD: tensors[EMBEDDING].clone()}
    save_file(tied, tmp_path / "a.safetensors")
    save_file({n: t for n, t in tied.items() if n not in (HEAD, EMBEDDING) or n == kept}, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert diff(*(reversed(files) if swap else files)).is_equal


def test_names_and_shapes_that_only_one_has(compare) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["extra"] = torch.ones(1)
        state[HEAD] = state[HEAD][:100].clone()
        del state["connector.fc1.bias"]

    found = compare(change)
    assert (found.only_a, found.only_b) == (("connector.fc1.bias",), ("extra",))
    assert found.shapes == {HEAD: ((260, 32), (100, 32))}
    text = difference_text(found)
    assert "3 tensors cannot be compared" in text and "(260, 32) in A, (100, 32) in B" in text
    assert not found.is_equal


def test_nothing_in_common(tmp_path) -> None:
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert "different models" in answer_of(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))


def test_numbers_that_are_none(compare) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[GEN].view(-1)[0] = math.nan
        state["connector.fc1.weight"].zero_()

    found = compare(change)
    assert math.isnan(found.different[0].relative) and found.different[0].name == GEN
    assert json.loads(difference_json(found))["tensors"][0]["max"] is None
    assert "nan" in difference_text(found)
    found = compare(lambda state: state["connector.fc1.weight"].zero_(), swap=True)
    assert math.isinf(found.different[0].relative)
    assert compare(lambda state: state[GEN].view(-1).__setitem__(0, math.inf)).different[0].max == math.inf


def test_equal_nans_differ_in_nothing(tmp_path) -> None:
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        save_file({"x": torch.tensor([math.nan, 1.0]).to(dtype)}, tmp_path / f"{name}.safetensors")
    assert diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").is_equal


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["hf", "both", "upstream_training"])
def test_layouts_of_one_model_are_equal(tmp_path, layout) -> None:
    (tmp_path / "b").mkdir()
    assert diff(bagel(tmp_path / "a"), LAYOUTS[layout](tmp_path / "b" / "folder")).is_equal


def test_a_checkpoint_with_frozen_parts(tmp_path) -> None:
    """Index over two files; in float32, while the other folder is in bfloat16."""
    folder = checkpoint(tmp_path / "0000001")
    found = diff(bagel(tmp_path / "base"), folder)
    assert not found.different and found.rounded
    state = load_file(folder / "model.trained.safetensors")
    save_file(state | {GEN: state[GEN] * 1.1}, folder / "model.trained.safetensors")
    assert [entry.name for entry in diff(folder, folder, weights_a="ema", weights_b="model").different] == [GEN]
    assert "(ema)" in diff(folder, folder).a


def test_adapters_are_compared_merged(tmp_path) -> None:
    folder = adapter(tmp_path / "lora")
    base = tmp_path / "lora_base"
    found = diff(base, folder)
    (entry,) = found.different
    assert entry.name == f"{LAYER}.weight" and len(found.tensors) > 90
    merged, before = (load_bagel(path, dtype="bfloat16").state_dict()[entry.name].double() for path in (folder, base))
    assert entry.rms == pytest.approx((merged - before).square().mean().sqrt().item(), rel=1e-4)
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="--base"):
        diff(moved, folder)
    assert len(diff(moved, folder, base=moved).different) == 1


def test_what_cannot_be_compared(tmp_path) -> None:
    folder = hf(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="has no ema.safetensors"):
        diff(folder, folder, weights_a="ema")
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        diff(tmp_path / "nowhere", folder)
    next(folder.glob("model-00001-*")).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="echo4o verify"):
        diff(folder, folder)


def test_shards_against_a_single_file(tmp_path, tensors) -> None:
    write_weights(tensors, tmp_path / "a")
    write_weights(tensors, tmp_path / "b", max_shard_bytes=50_000)
    assert diff(Path(tmp_path / "a"), str(tmp_path / "b")).is_equal
