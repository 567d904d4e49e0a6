"""Runs of many requests: what is kept, what is done again, failures, memory, and batches that do not change results."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.generate import runs
from echo4o.generate.batches import batches_of
from echo4o.generate.files import read_metadata
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.presets import PRESETS
from echo4o.generate.requests import read_requests
from echo4o.generate.results import Results
from echo4o.generate.runs import ModelName, run_items
from tests.generate.request_files import contents_of, results_of, write_pictures, write_requests
from tests.train.tiny_run import write_bagel

MODEL = ModelName("tiny", "abc", "float32")
BOTH = ["red.png", "blue.png"]
LINES = (
    {"prompt": "a red disc", "height": 32, "width": 48},
    {"id": "two", "prompt": "<image 2> left of <image 1>", "images": BOTH, "num_images": 2},
    {"id": "asked", "prompt": "what?", "images": ["red.png"], "understand": True, "max_think_tokens": 6},
    {"id": "thought", "prompt": "ein schönes 图", "think": True, "max_think_tokens": 5, "height": 32, "width": 32},
    {"id": "ordered", "elements": [{"image": "red.png"}, "becomes", {"image": "blue.png"}, "soon"], "seed": 5},
)
DEFAULTS = {"num_timesteps": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = write_bagel(tmp_path_factory.mktemp("model") / "tiny")
    return Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu")


class Fake:
    """A pipeline that draws black, counts its batches, and fails as told."""

    def __init__(self, memory=100, broken=()):
        self.memory, self.broken, self.batches = memory, broken, []

    def batch(self, requests, on_step=None):
        self.batches.append([request.elements[-1] for request in requests])
        if len(requests) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for request in requests:
            if request.elements[-1] in self.broken:
                raise ValueError(f"cannot draw {request.elements[-1]}")
        infos = [
            {"image": i, "seed": request.seed, "height": 16, "width": 16, "text": "", "settings": PRESETS["t2i"]}
            for i, request in enumerate(requests)
        ]
        return SimpleNamespace(images=[Image.new("RGB", (16, 16)) for _ in requests], texts=[], info=infos)


def items_of(folder, *lines):
    write_pictures(folder)
    items, problems = read_requests(write_requests(folder / "requests.jsonl", *lines), DEFAULTS)
    assert not problems
    return items


def fakes(folder, count):
    return items_of(folder, *({"id": f"{i}", "prompt": f"{i}"} for i in range(count)))


def run_rank(items, out, pipe, **options):
    return run_items(items, out, lambda: pipe, MODEL, **options)


def run(items, out, pipe, **options):
    summary = run_rank(items, out, pipe, **options)
    assert summary is not None
    return summary


def test_pictures_texts_and_results(tmp_path, pipe):
    items = items_of(tmp_path, *LINES)
    summary = run(items, tmp_path / "out", pipe)
    assert (summary.num_done, summary.num_skipped, summary.failed) == (5, 0, {})
    results = results_of(tmp_path / "out")
    assert [result["id"] for result in results] == ["00001", "two", "asked", "thought", "ordered"]
    files = [name for result in results for name in result["files"]]
    assert files == ["00001.png", "two_0.png", "two_1.png", "asked.txt", "thought.png", "thought.txt", "ordered.png"]
    assert sorted(contents_of(tmp_path / "out")) == sorted(files)
    second = read_metadata(tmp_path / "out" / "two_1.png")
    assert second["seed"] == items[1].seed + 1 == read_metadata(tmp_path / "out" / "two_0.png")["seed"] + 1
    assert [e if isinstance(e, str) else e["image"] for e in second["elements"]] == ["blue.png", "left of", "red.png"]
    assert (second["prompt"], second["settings"]["num_timesteps"]) == (LINES[1]["prompt"], 3)
    answer = (tmp_path / "out" / "asked.txt").read_text(encoding="utf-8")
    assert answer == results[2]["text"] + "\n" and results[2]["text"]
    assert Image.open(tmp_path / "out" / "00001.png").size == (48, 32)


def test_results_are_the_pipelines(tmp_path, pipe):
    run(items_of(tmp_path, *LINES), tmp_path / "out", pipe)
    direct = pipe(LINES[1]["prompt"], [tmp_path / name for name in BOTH], num_timesteps=3, num_images=2,
                  seed=read_metadata(tmp_path / "out" / "two_0.png")["seed"])  # fmt: skip
    for i, image in enumerate(direct.images):
        assert (
            np.abs(np.asarray(image, int) - np.asarray(Image.open(tmp_path / "out" / f"two_{i}.png"), int)).max() <= 1
        )
    assert results_of(tmp_path / "out")[2]["text"] == pipe.understand(
        "what?", [tmp_path / "red.png"], max_think_tokens=6
    )


def test_batches_do_not_change_results(tmp_path, pipe):
    items = items_of(tmp_path, *LINES)
    run(items, tmp_path / "one", pipe)
    run(items, tmp_path / "three", pipe, batch_size=3)
    assert results_of(tmp_path / "one") == results_of(tmp_path / "three")
    for name in contents_of(tmp_path / "one"):
        if name.endswith(".png"):
            one, three = (np.asarray(Image.open(tmp_path / f / name), int) for f in ("one", "three"))
            assert np.abs(one - three).max() <= 1  # rounding of float32, then to 8 bits


def test_any_number_of_ranks_gives_the_same_files(tmp_path, pipe):
    """Also in batches: they are made of the whole list, then dealt."""
    items = items_of(tmp_path, *LINES)
    run(items, tmp_path / "one", pipe, batch_size=2)
    for rank in (2, 0, 1):
        summary = run_items(items, tmp_path / "three", lambda: pipe, MODEL, batch_size=2, rank=rank, world_size=3)
        assert (summary is None) == (rank != 1)
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "three")
    assert results_of(tmp_path / "one") == results_of(tmp_path / "three")


def test_finished_requests_are_kept_and_changed_ones_done_again(tmp_path):
    out = tmp_path / "out"
    run(fakes(tmp_path, 3), out, Fake())
    summary = run(fakes(tmp_path, 3), out, None)  # no pipeline is needed
    assert (summary.num_done, summary.num_skipped) == (0, 3)

    (out / "0.png").unlink()
    pipe = Fake()
    run(fakes(tmp_path, 4), out, pipe)
    assert pipe.batches == [["0"], ["3"]]

    changed = Fake()
    lines = [
        {"id": "1", "prompt": "1", "seed": 9},
        {"id": "2", "prompt": "2", "num_images": 2},
        {"id": "3", "prompt": "3"},
    ]
    run(items_of(tmp_path, *lines), out, changed)
    assert changed.batches == [["1"], ["2"], ["2"]]
    assert sorted(contents_of(out)) == ["0.png", "1.png", "2_0.png", "2_1.png", "3.png"]  # 2.png is not its result now
    assert run(items_of(tmp_path, *lines), out, Fake(), overwrite=True).num_done == 3


def test_killed_between_picture_and_line(tmp_path, monkeypatch):
    """Changed, drawn, killed before its line, changed back: the picture is not that of the old line any more."""
    red, blue = {"id": "a", "prompt": "red"}, {"id": "a", "prompt": "blue"}
    run(items_of(tmp_path, red), tmp_path / "out", Fake())
    add = Results.add

    def killed(self, record):
        if "fingerprint" in record:
            raise KeyboardInterrupt
        add(self, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "add", killed)
        run(items_of(tmp_path, blue), tmp_path / "out", Fake())
    assert read_metadata(tmp_path / "out" / "a.png")["prompt"] == "blue"
    assert run(items_of(tmp_path, red), tmp_path / "out", Fake()).num_done == 1
    assert read_metadata(tmp_path / "out" / "a.png")["prompt"] == "red"
    (result,) = results_of(tmp_path / "out")
    assert result["prompt"] == "red" and "started" not in result


def test_files_of_an_older_result_go_after_a_failure_too(tmp_path):
    out = tmp_path / "out"
    run(items_of(tmp_path, {"id": "a", "prompt": "x", "num_images": 2}), out, Fake())
    one = items_of(tmp_path, {"id": "a", "prompt": "x"})
    assert run(one, out, Fake(broken="x")).failed
    assert sorted(contents_of(out)) == ["a_0.png", "a_1.png"]
    assert run(one, out, Fake()).num_done == 1
    assert list(contents_of(out)) == ["a.png"]


def test_files_of_an_older_result_stay_if_they_are_wanted(tmp_path):
    """By another request, as its result or its reference."""
    out = tmp_path / "out"
    run(items_of(tmp_path, {"id": "a", "prompt": "x", "num_images": 3}), out, Fake())
    lines = [{"id": "a_0", "prompt": "y", "images": ["out/a_2.png"]}, {"id": "a", "prompt": "x"}]
    assert run(items_of(tmp_path, *lines), out, Fake()).num_done == 2
    assert sorted(contents_of(out)) == ["a.png", "a_0.png", "a_2.png"]


def test_a_result_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch):
    write = runs.write_picture

    def picky(image, path, metadata):
        if path.name == "1.png":
            raise ValueError("cannot be said")
        write(image, path, metadata)

    monkeypatch.setattr(runs, "write_picture", picky)
    summary = run(fakes(tmp_path, 3), tmp_path / "out", Fake())
    assert (summary.num_done, summary.failed) == (2, {"1": "ValueError: cannot be said"})
    monkeypatch.undo()
    assert run(fakes(tmp_path, 3), tmp_path / "out", Fake()).num_done == 1


def test_names_that_are_no_text(tmp_path):
    write_pictures(tmp_path)
    shutil.copy(tmp_path / "red.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    line = json.dumps({"id": "a", "prompt": "x", "images": [os.fsdecode(b"caf\xe9.png")]})  # with an escape
    assert run(items_of(tmp_path, line), tmp_path / "out", Fake()).num_done == 1
    assert read_metadata(tmp_path / "out" / "a.png")["images"][0]["image"] == "caf\\udce9.png"


def test_a_rank_of_a_killed_run_does_not_end_the_next_one(tmp_path):
    """Rank 1 was through, rank 0 killed; in the next run rank 0 is through before rank 1 has begun."""
    items, out = fakes(tmp_path, 2), tmp_path / "out"
    assert run_rank(items, out, Fake(), rank=1, world_size=2, run="first") is None
    assert run_rank(items, out, Fake(), rank=0, world_size=2, run="second") is None
    summary = run_rank(items, out, Fake(), rank=1, world_size=2, run="second")
    assert summary is not None and summary.num_skipped == 1


def test_another_model_or_picture_is_done_again(tmp_path):
    items = items_of(tmp_path, {"id": "a", "prompt": "a", "images": ["red.png"]})
    run(items, tmp_path / "out", Fake())
    other = run_items(items, tmp_path / "out", Fake, ModelName("tiny", "def", "float32"))  # pyright: ignore
    assert other is not None and other.num_done == 1
    shutil.copy(tmp_path / "blue.png", tmp_path / "red.png")
    again, _ = read_requests(tmp_path / "requests.jsonl", DEFAULTS)
    assert run_items(again, tmp_path / "out", Fake, ModelName("tiny", "def", "float32")).num_done == 1  # pyright: ignore


def test_a_failure_is_named_and_the_others_go_on(tmp_path, capsys):
    pipe = Fake(broken=("1", "3"))
    summary = run(fakes(tmp_path, 5), tmp_path / "out", pipe, batch_size=5)
    assert summary.num_done == 3
    assert summary.failed == {"1": "ValueError: cannot draw 1", "3": "ValueError: cannot draw 3"}
    assert "1 failed: ValueError: cannot draw 1" in capsys.readouterr().err
    assert sorted(contents_of(tmp_path / "out")) == ["0.png", "2.png", "4.png"]
    assert [result.get("error") for result in results_of(tmp_path / "out")][1] == "ValueError: cannot draw 1"
    assert run(fakes(tmp_path, 5), tmp_path / "out", Fake()).num_done == 2  # tried again


def test_out_of_memory_halves_the_batch_for_good(tmp_path):
    pipe = Fake(memory=2)
    assert run(fakes(tmp_path, 16), tmp_path / "out", pipe, batch_size=8).num_done == 16
    assert [len(batch) for batch in pipe.batches] == [8, 4, *[2] * 8]


def test_out_of_memory_alone_is_a_failure_with_a_remedy(tmp_path):
    summary = run(fakes(tmp_path, 2), tmp_path / "out", Fake(memory=0), batch_size=2)
    assert set(summary.failed) == {"0", "1"}
    assert "ask for a smaller --height and --width" in summary.failed["0"]


def test_a_broken_device_ends_the_run(tmp_path):
    class Broken:
        def batch(self, requests, on_step=None):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError):
        run(fakes(tmp_path, 2), tmp_path / "out", Broken())


def test_batches_hold_requests_that_are_alike(tmp_path):
    sizes = (64, 16, 48, 32)
    lines = [{"id": f"{side}", "prompt": "x", "height": side, "width": side} for side in sizes]
    lines += [{"id": "q", "prompt": "x", "understand": True}, {"id": "many", "prompt": "x", "num_images": 5}]
    items = items_of(tmp_path, *lines)
    assert [[item.id for item in batch] for batch in batches_of(items, 2)] == [
        ["many"],
        ["64", "48"],
        ["32", "16"],
        ["q"],
    ]
    assert [item.id for (item,) in batches_of(items, 1)] == ["64", "16", "48", "32", "q", "many"]
