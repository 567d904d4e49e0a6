"""Run by `test_remote_code` in a process that cannot import echo4o: load every case's folder with transformers.

python load_remote.py CASES.pt RESULTS.json
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["echo4o"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
REMOTE: dict[str, Any] = {"trust_remote_code": True}
Case = dict[str, Any]


def load(case: Case, auto: type = AutoModel, folder: str | None = None, **options: Any) -> Any:
    model, report = auto.from_pretrained(
        folder or case["folder"], output_loading_info=True, **{"dtype": torch.float32, **REMOTE, **options}
    )
    assert not any(report.values()), report
    return model


def same(model: Any, case: Case, tolerance: float = 1e-6) -> None:
    """Names, values and outputs are those of the model that was saved."""
    state = model.state_dict()
    assert set(state) == set(case["state"]), set(state) ^ set(case["state"])
    for name, tensor in case["state"].items():
        torch.testing.assert_close(state[name].float(), tensor, rtol=tolerance, atol=tolerance, msg=name)
    with torch.no_grad():
        out = model(**case["fields"], packed_latents=case["latents"], noise=case["noise"])
    for name, wanted in case["out"].items():
        torch.testing.assert_close(out[name].float(), wanted, rtol=10 * tolerance, atol=10 * tolerance, msg=name)


def check_loading(case: Case) -> None:
    model = load(case)
    same(model, case)
    assert not model.training and type(model).__name__ == case["config"]["architectures"][0]
    assert model.config.hidden_size == case["config"]["llm_config"]["hidden_size"]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == case["config"]["tie_word_embeddings"]


def check_config(case: Case) -> None:
    config = AutoConfig.from_pretrained(case["folder"], **REMOTE)
    written = json.loads(config.to_json_string())
    assert {name: written[name] for name in case["config"] if name != "torch_dtype"} == {
        name: value for name, value in case["config"].items() if name != "torch_dtype"
    }
    fresh = AutoModel.from_config(config, **REMOTE)
    assert fresh.llm2vae.weight.count_nonzero() == 0 and fresh.vae2llm.weight.count_nonzero() > 0
    torch.testing.assert_close(fresh.latent_pos_embed.pos_embed.detach(), case["state"]["latent_pos_embed.pos_embed"])


def check_dtype(case: Case) -> None:
    assert {p.dtype for p in load(case, dtype="auto").parameters()} == {torch.float32}
    model = load(case, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    same(model.float(), case, tolerance=1e-2)


def check_round_trip(case: Case) -> None:
    """Saved by transformers and loaded again, code included; also placed by accelerate, copied, and in shards."""
    with tempfile.TemporaryDirectory() as folder:
        load(case, AutoModelForCausalLM, device_map={"": "cpu"}).save_pretrained(folder, max_shard_size="100KB")
        assert (Path(folder) / "model.safetensors.index.json").is_file()
        same(copy.deepcopy(load(case, folder=folder, device_map="auto")), case)


def check_gradient(case: Case) -> None:
    model = load(case).train()
    model(**case["fields"], packed_latents=case["latents"], noise=case["noise"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without
    assert not model.latent_pos_embed.pos_embed.requires_grad
    loss, *_ = model(**case["fields"], packed_latents=case["latents"], noise=case["noise"], return_dict=False)
    assert loss.isfinite()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert model.config.vocab_size == model.config.llm_config["vocab_size"] == len(model.get_input_embeddings().weight)


def check_errors(case: Case) -> None:
    model = load(case)
    for call, error, words in (
        (lambda: model.pipeline(), ImportError, "pip install"),
        (lambda: model(**case["fields"], packed_latents=None), ValueError, "packed_latents"),
        (lambda: model(**case["fields"], nonsense=1), TypeError, "nonsense"),
        (lambda: model.load_vae(Path(case["folder"]).parent), OSError, "ae.safetensors"),
    ):
        try:
            call()
        except error as found:
            assert words in str(found), found
        else:
            raise AssertionError(f"no {error.__name__} about {words}")


def check_beside(case: Case) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    assert tokenizer(case["text"])["input_ids"] == case["ids"]
    vae = load(case).load_vae()
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(case["z"]), case["image"], rtol=1e-5, atol=1e-5)


def check_adapters(case: Case) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(case), case["adapter"])
    with torch.no_grad():
        out = model(**case["fields"], packed_latents=case["latents"], noise=case["noise"])
    for name, wanted in case["adapted"].items():
        torch.testing.assert_close(out[name], wanted, rtol=1e-5, atol=1e-5, msg=name)
    merged = model.merge_and_unload().state_dict()
    assert set(merged) == set(case["merged"])
    for name, wanted in case["merged"].items():
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


def check_pipeline(case: Case) -> None:
    """With echo4o, which the last check may import: pictures from these very weights."""
    del sys.modules["echo4o"]
    sys.path.insert(0, case["root"])
    model = load(case)
    model.vae2llm.weight.requires_grad_(False)
    pipe = model.pipeline()
    theirs = dict(pipe.model.named_parameters())
    assert all(theirs[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    assert not model.vae2llm.weight.requires_grad and model.llm2vae.weight.requires_grad
    out = pipe("a red square", seed=1, height=64, width=64, num_timesteps=3)
    other = type(pipe).from_pretrained(case["folder"], dtype="float32", device="cpu")
    wanted = other("a red square", seed=1, height=64, width=64, num_timesteps=3)
    assert torch.equal(out.info[0]["latents"], wanted.info[0]["latents"])
    model.vae2llm.to("meta")
    try:
        model.pipeline()
    except ValueError as found:
        assert "vae2llm" in str(found) and "offload" in str(found)
    else:
        raise AssertionError("a model without weights gave a pipeline")


def main(cases: dict[str, Case], results: Path) -> None:
    checks: list[tuple[str, str, Callable[[Case], None]]] = [
        *((f"loading {name}", name, check_loading) for name in cases),
        *(
            (function.__name__.removeprefix("check_"), "whole", function)
            for function in (
                check_config,
                check_dtype,
                check_round_trip,
                check_gradient,
                check_errors,
                check_beside,
                check_adapters,
                check_pipeline,
            )
        ),
    ]
    found = {}
    for title, name, check in checks:
        try:
            check(cases[name])
            found[title] = ""
        except Exception:
            found[title] = traceback.format_exc()
    results.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(torch.load(sys.argv[1]), Path(sys.argv[2]))
