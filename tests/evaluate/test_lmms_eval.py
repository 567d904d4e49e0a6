"""The model for lmms-eval, against a stand-in of its interface; lmms-eval itself is not installed in tests."""

import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from echo4o.evaluate import lmms_eval

TINY = Path(__file__).resolve().parents[2] / "data_examples" / "tiny_bagel"
ROWS = [
    {"question": "What is on the picture?", "images": [Image.new("RGB", (40, 30), "red")]},
    {"question": "Which is larger?", "images": [[Image.new("RGB", (64, 64), "blue")], None, Image.new("L", (30, 90))]},
    {"question": "How many?", "images": []},
]


@dataclass
class Instance:
    args: tuple[Any, ...]


def visuals(row: dict) -> Any:
    return row["images"]


def questions(**how) -> list[Instance]:
    return [Instance((row["question"], how, visuals, n, "task", "test")) for n, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def model():
    one = lmms_eval.Echo4o(str(TINY), batch_size=2, device="cpu")
    one.task_dict = {"task": {"test": ROWS}}
    return one


def test_answers_are_those_of_the_pipeline_and_batches_change_nothing(model):
    together = model.generate_until(questions(max_new_tokens=6))
    pipe = model.pipeline
    for answer, row in zip(together, ROWS, strict=True):
        images = list(lmms_eval._flat(row["images"]))
        assert answer == pipe.understand(row["question"], images, inline=False, max_think_tokens=7).strip()
    model.batch_size, before = 1, model.batch_size
    assert model.generate_until(questions(max_new_tokens=6)) == together
    model.batch_size = before


def test_answers_end_at_the_tasks_stops(model):
    (whole, *_) = model.generate_until(questions(max_new_tokens=12))
    if len(whole) < 2:
        pytest.skip("the tiny model has nothing to say")
    stop = whole[1]
    (cut, *_) = model.generate_until(questions(max_new_tokens=12, until=["", stop]))
    assert cut == whole.split(stop)[0].strip()
    assert lmms_eval._cut("a\n\nb", "\n\n") == "a" and lmms_eval._cut(" a ", None) == "a"


def test_temperature_zero_is_greedy(model):
    greedy = model.generate_until(questions(max_new_tokens=4))
    assert model.generate_until(questions(max_new_tokens=4, temperature=0, do_sample=True, top_p=None)) == greedy


def test_a_greedy_answer_is_known_as_such_and_another_is_not(model):
    tokenizer = model.pipeline.tokenizer
    (answer,) = (r["text"] for r in model.pipeline.batch([model._request(*questions(max_new_tokens=3)[0].args)]).info)
    row = Instance(("What is on the picture?", answer, visuals, 0, "task", "test"))
    other = Instance(("What is on the picture?", lambda row: "zebra!", visuals, 0, "task", "test"))
    (likely, is_greedy), (less, is_other_greedy) = model.loglikelihood([row, other])
    assert less < 0 and not is_other_greedy
    if tokenizer.decode(tokenizer.encode(answer)) == answer and answer:
        assert is_greedy and less < likely < 0


def test_log_probabilities_are_those_of_a_token_at_a_time(model):
    """Teacher forcing in one pass against the chain rule, one continuation longer each time."""
    ids = model.pipeline.tokenizer.encode("a red cube")
    texts = [model.pipeline.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    if any(model.pipeline.tokenizer.encode(text) != ids[: n + 1] for n, text in enumerate(texts)):
        pytest.skip("the tokenizer does not split at these places")
    images = list(lmms_eval._flat(ROWS[0]["images"]))
    values = [model._likelihood("What?", images, text)[0] for text in texts]
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert math.isclose(model._likelihood("What?", images, texts[-1])[0], values[-1], rel_tol=1e-5)
    assert model._likelihood("What?", images, "") == (0.0, True)
    assert model._likelihood("", [], "a")[0] < 0


def test_images_are_resized_for_the_vision_encoder_alone(model):
    transform = model.pipeline.vit_transform
    side = model.pipeline.model.config.vit_max_num_patch_per_side * transform.image_stride
    assert model.pipeline.vae_transform is transform
    assert (transform.max_image_size, transform.min_image_size) == (side, side // 2)
    with pytest.raises(ValueError, match="unknown model argument 'max_size'"):
        lmms_eval.Echo4o(str(TINY), pipeline=model.pipeline, max_size=3)
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_with_lmms_eval_the_model_is_one_of_its_own_and_registered(monkeypatch, model):
    registry: dict[str, type] = {}

    class lmms:
        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = Hook()

        @property
        def rank(self) -> int:
            return self._rank

    class Hook:
        def __init__(self) -> None:
            self.kept: list[tuple] = []

        def add_partial(self, *what: Any) -> None:
            self.kept.append(what)

    def register_model(*names: str):
        return lambda kind: [registry.update({name: kind}) for name in names] and kind

    for name, content in {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.registry": {"register_model": register_model},
    }.items():  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    spec = importlib.util.find_spec("echo4o.evaluate.lmms_eval")
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert registry == {"echo4o": again.Echo4o} and issubclass(again.Echo4o, lmms)
    one = again.Echo4o(str(TINY), pipeline=model.pipeline)
    one.task_dict = {"task": {"test": ROWS}}
    assert (one.rank, one.world_size, one.device) == (1, 2, torch.device("cpu"))
    answers = one.generate_until(questions(max_new_tokens=2))
    assert [kept[0] for kept in one.cache_hook.kept] == ["generate_until"] * 3 and len(answers) == 3
