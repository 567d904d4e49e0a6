"""Pictures of fixed requests on the way of a run: files, page, board, several ranks."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o.checkpoint.hf.command import _drawn_while_training
from echo4o.cli.training import run_training, sampler_of
from echo4o.config import ConfigError, load_config
from echo4o.evaluate.during_training import RequestSampler, write_page
from echo4o.evaluate.sample_page import page_html
from echo4o.generate.files import read_metadata
from echo4o.train.evaluating import SECONDS
from echo4o.train.metrics import read_metrics
from tests.evaluate.evaluated_run import IMAGES, evaluated, trainings, write_requests
from tests.train.launch import free_port, launch
from tests.train.tiny_run import write_bagel

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="an extra")
PICTURES = ["text_0.png", "text_1.png", "two.png"]


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("model") / "bagel")


@pytest.fixture(scope="module")
def whole(bagel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, two packs a step."""
    out = tmp_path_factory.mktemp("run") / "out"
    requests = write_requests(out.parent / "requests.jsonl")
    settings = evaluated(bagel, out, eval_requests=str(requests), gradient_accumulation_steps=2)
    trainings([(0, settings)])
    return out


def test_every_evaluation_leaves_pictures_a_sheet_and_a_row_on_the_page(whole: Path) -> None:
    samples = whole / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [
        "0000000", "0000002", "0000003", "index.html", "references",
    ]  # fmt: skip
    for step in ("0000000", "0000002", "0000003"):
        assert sorted(p.name for p in (samples / step).iterdir()) == ["sheet.png", "step.json", *PICTURES]
    told = json.loads((samples / "0000003" / "step.json").read_text())
    assert told["step"] == 3 and told["losses"]["val/mse"] > 0
    assert told["requests"][0]["references"] == ["two_1.png", "two_2.png"]
    with Image.open(samples / "references" / "two_2.png") as copy, Image.open(IMAGES / "000_2.png") as reference:
        assert copy.size == reference.size
    metadata = read_metadata(samples / "0000003" / "text_1.png")
    assert (metadata["prompt"], metadata["height"], metadata["model"]["name"]) == ("A red square.", 32, "out step 3")
    page = (samples / "index.html").read_text()
    order = [page.index(f"<b>{step}</b>") for step in (3, 2, 0)]
    assert order == sorted(order) and "Fill image 1 with image 2." in page
    links = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(links) == 2 + 9 and all((samples / link).is_file() for link in links)
    assert _drawn_while_training(whole, 2) == samples / "0000002" / "sheet.png"
    assert _drawn_while_training(whole, None) == samples / "0000003" / "sheet.png"
    assert _drawn_while_training(whole.parent, 3) is None


def assert_as_one_process(out: Path, whole: Path) -> None:
    one, other = read_metrics(out / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for mine, theirs in zip(one, other, strict=True):
        names = [name for name in theirs if name.startswith("val/") or name in ("loss", "grad_norm")]
        assert (SECONDS in theirs) == ("val/mse" in names) and set(names) <= set(mine)
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    for path in whole.glob("samples/0*/[a-r,t-z]*.png"):
        pictures = [np.asarray(Image.open(p)).astype(int) for p in (path, out / path.relative_to(whole))]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_two_ranks_measure_and_draw_as_one(bagel: Path, whole: Path, tmp_path: Path) -> None:
    """What is trained after an evaluation shows that no gathered weights of the average are left over."""
    settings = evaluated(bagel, tmp_path / "out", eval_requests=str(whole.parent / "requests.jsonl"))
    launch(2, "tests.evaluate.evaluated_run:trainings", [(free_port(), settings)])
    assert_as_one_process(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sharding_strategy": "SHARD_GRAD_OP"},
        {"sharding_strategy": "NO_SHARD"},
        pytest.param({"engine": "deepspeed", "zero_stage": 2}, marks=needs_deepspeed),
        pytest.param({"engine": "deepspeed", "zero_stage": 3, "eval_requests": None}, marks=needs_deepspeed),
    ],
)
def test_every_engine_evaluates_as_one_process(bagel: Path, whole: Path, tmp_path: Path, changes: dict) -> None:
    requests = str(whole.parent / "requests.jsonl")
    settings = evaluated(bagel, tmp_path / "out", **{"eval_requests": requests, **changes})
    launch(2, "tests.evaluate.evaluated_run:trainings", [(free_port(), settings)])
    if not settings["eval_requests"]:
        (tmp_path / "out" / "samples").symlink_to(whole / "samples")
    assert_as_one_process(tmp_path / "out", whole)


def test_requests_that_cannot_be_used_are_said_before_training(
    bagel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_requests(tmp_path / "r.jsonl", {"id": "two", "prompt": "x"}, {"prompt": "y", "images": ["no.png"]})
    config = load_config((), evaluated(bagel, tmp_path / "out", eval_requests=str(requests)))
    with pytest.raises(ConfigError, match=r"mend its lines:\n  line 3: id 'two' .*\n  line 4: .*no.png"):
        sampler_of(config)
    requests.write_text("")
    with pytest.raises(ConfigError, match="it has no lines"):
        sampler_of(config)
    requests.unlink()
    assert sampler_of(config) is None
    words = [word for name, value in evaluated(bagel, tmp_path / "out").items() for word in (f"--{name}", str(value))]
    assert run_training([*words, "--eval_requests", str(requests)]) == 2
    assert f"eval_requests is {requests} (command line), which is not a file" in capsys.readouterr().err
    assert sampler_of(load_config((), {**evaluated(bagel, tmp_path), "eval_every": 0})) is None


def test_a_request_that_this_model_cannot_draw_warns_and_the_others_are_drawn(
    bagel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = write_requests(tmp_path / "r.jsonl", {"id": "large", "prompt": "x", "height": 4096, "width": 4096})
    settings = evaluated(
        bagel, tmp_path / "out", eval_requests=str(requests), total_steps=1, eval_every=9, validation_config_file=None
    )
    with caplog.at_level(logging.WARNING):
        trainings([(0, settings)])
    assert "request large of eval_requests: output size 4096" in caplog.text
    step = tmp_path / "out" / "samples" / "0000001"
    assert sorted(path.name for path in step.iterdir()) == ["sheet.png", "step.json", *PICTURES]
    assert "output size 4096" in (step.parent / "index.html").read_text()


def test_pictures_of_an_earlier_run_are_set_aside(tmp_path: Path) -> None:
    sampler = RequestSampler(write_requests(tmp_path / "r.jsonl"), "run")
    samples = tmp_path / "samples"
    for step in (0, 2, 4):
        (samples / f"{step:07d}").mkdir(parents=True)
    sampler.begin(samples, 2)
    assert [path.name for path in sorted(samples.glob("0*"))] == ["0000000", "0000002"]
    sampler.begin(samples, 0)
    assert [path.name for path in sorted((samples / "earlier").iterdir())] == ["0000000", "0000002", "0000004"]
    assert write_page(samples, "run").read_text().count("<tr>") == 1


def test_the_page_escapes_what_requests_say() -> None:
    request = {
        "id": "a", "prompt": "<script>alert(1)</script>", "references": [], "pictures": ['a".png'], "text": "<b>",
        "problem": "",
    }  # fmt: skip
    page = page_html([{"step": 1, "losses": {}, "requests": [request]}], "<run>")
    assert "<script" not in page and "<run>" not in page and "&lt;b&gt;" in page and 'a".png' not in page
