"""Laying the page out, its messages, and what a click in the history puts back."""

from __future__ import annotations

import socket
import sys

import gradio as gr
import pytest

from echo4o.app import build, serve
from echo4o.app.controls import drawing_controls
from echo4o.app.page import check_port, messages
from echo4o.app.parameters import CUSTOM, LAST, Limits
from echo4o.app.studio import Job, Result
from echo4o.app.tabs import build_tab, summary, thumbnail
from echo4o.generate.pipeline import Echo4oPipeline
from tests.app.pages import values_of
from tests.train.tiny_run import tiny_config, write_bagel

TINY = Limits(128, 16)


def result_of(task, prompt, references=(), picture="drawn.png", **changes):
    job = Job(task, prompt, tuple(references), values_of(task, **changes))
    return Result(job, picture, (128, 96) if picture else None, "" if picture else "a cube", 1.25)


def labels(page):
    return [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]


def test_without_gradio_the_error_names_the_extra(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'echo4o\[app\]'"):
        build(pipe)
    with pytest.raises(ImportError, match=r"pip install 'echo4o\[app\]'"):
        serve("nowhere")


def test_serve_checks_port_and_model_before_loading(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="pass another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(OSError, match="pass another --port"):
            serve(tmp_path, port=taken.getsockname()[1])
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        serve(tmp_path / "nowhere", port=0)


def test_tabs_are_what_the_model_can_do(pipe, tmp_path):
    assert labels(build(pipe, "tiny")) == ["Text → Image", "Multi-reference", "Edit", "Understand"]
    config = tiny_config()
    config.visual_und = False
    folder = write_bagel(tmp_path / "draws", config)
    page = build(Echo4oPipeline.from_pretrained(folder, dtype="float32", device="cpu"))
    assert labels(page) == ["Text → Image", "Multi-reference", "Edit"]


def test_the_page_calls_nobody(pipe):
    page = build(pipe)
    assert page.analytics_enabled is False
    assert all(
        function.api_visibility == "private" for function in page.fns.values() if function.targets[0][1] != "unload"
    )


def test_one_queue_for_the_model(pipe):
    running = [function for function in build(pipe).fns.values() if function.concurrency_id == "model"]
    assert len(running) == 4 and all(function.concurrency_limit == 1 for function in running)


def test_ranges_come_from_the_model():
    with gr.Blocks():
        controls = drawing_controls("t2i", TINY, None).by_name
    assert (controls["width"].maximum, controls["width"].minimum, controls["width"].step) == (128, 16, 16)
    assert controls["size"].choices[0] == ("1:1 · 128 × 128", "1:1") and controls["size"].choices[-1][1] == CUSTOM


@pytest.mark.parametrize("error", [ValueError("see <image 3>"), TypeError("see <image 3>"), OSError("see <image 3>")])
def test_mistakes_become_messages(error):
    with pytest.raises(gr.Error) as caught, messages():
        raise error
    assert caught.value.message == "see &lt;image 3&gt;", "Gradio reads messages as HTML"
    assert caught.value.print_exception is False


def test_bugs_stay_visible():
    with pytest.raises(ZeroDivisionError), messages():
        raise ZeroDivisionError


def test_a_click_in_the_history_restores_the_tab():
    with gr.Blocks(), gr.Tabs():
        tab = build_tab("multi_ref", TINY, messages)
    result = result_of("multi_ref", "both", ["a.png", "b.png"], seed=7, size="2", cfg_img_scale=1.5)
    values = tab.restored(result)
    assert values[tab.prompt] == "both"
    assert values[tab.references] == [("a.png", "image 1"), ("b.png", "image 2")]
    assert values[tab.controls.by_name["seed"]] == 7 and values[tab.controls.by_name["cfg_img_scale"]] == 1.5
    size = values[tab.controls.by_name["size"]]
    assert size.value == "2" and ("As image 2", "2") in size.choices
    assert set(values) >= set(tab.inputs), "nothing of another job stays behind"


@pytest.mark.parametrize("task", ["t2i", "edit", "understand"])
def test_inputs_become_a_job_and_come_back(task):
    with gr.Blocks(), gr.Tabs():
        tab = build_tab(task, TINY, messages)
    references = {"t2i": None, "edit": "a.png", "understand": [("a.png", "image 1")]}[task]
    values = values_of(task)
    given = ["words", *([references] if references else []), *(values[name] for name in tab.controls.by_name)]
    job = tab.job(given)
    assert (job.task, job.prompt, job.references) == (task, "words", ("a.png",) if references else ())
    restored = tab.restored(Result(job, None if task == "understand" else "x.png", None, "said", 1.0))
    assert [restored[component] for component in tab.inputs] == given


def test_lines_under_results():
    first = result_of("t2i", "a cube", seed=4)
    assert summary([first]) == "Seed 4 · 128 × 96 px · 1.2 s"
    assert summary([first, result_of("t2i", "a cube", seed=5)]) == "Seeds 4–5 · 128 × 96 px · 1.2 s"
    assert summary([result_of("understand", "what?", ["a.png"], None)]) == "1.2 s"
    assert thumbnail(first) == ("drawn.png", "4 · a cube")
    assert thumbnail(result_of("understand", "what?", ["a.png"], None)) == ("a.png", "what? → a cube")
    assert result_of("edit", "x").job.values["size"] == LAST
