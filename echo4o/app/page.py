"""The page: tabs and history, and which button does what."""

from __future__ import annotations

import html
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch
from gradio.themes import Default

from echo4o.app.controls import QUICK
from echo4o.app.studio import Cancelled, Result, Studio
from echo4o.app.tabs import Tab, build_tab, thumbnail
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.runs import ModelName

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.images .grid-container { padding-top: 36px !important; }
.grid-wrap { overflow-y: auto !important; }
.small-buttons { gap: 6px !important; }
.headline h1 { margin: 0; font-size: 1.5rem; }
.headline p { margin: 0; color: var(--body-text-color-subdued); }
.summary { min-height: 1.4em; color: var(--body-text-color-subdued); }
"""
DAY = 24 * 3600  # seconds
HISTORY = 60  # results a session remembers


def build_page(pipe: Echo4oPipeline, model: ModelName) -> gr.Blocks:
    """See `echo4o.app.build`."""
    studio, config, name = Studio(pipe, model), pipe.model.config, model.name
    tasks = [
        *(["t2i", "multi_ref", "edit"] if config.visual_gen else []),
        *(["understand"] if config.visual_und else []),
    ]
    # Uploads and copies of results go when the server stops, and once they are a day old.
    with gr.Blocks(
        title=f"echo4o · {name}" if name else "echo4o", analytics_enabled=False, delete_cache=(DAY, DAY)
    ) as page:
        gr.Markdown(f"# echo4o\n{_headline(pipe, studio)}", elem_classes="headline")
        with gr.Tabs(selected=tasks[0], elem_id="tabs") as tabs:
            made = {task: build_tab(task, studio.limits, messages) for task in tasks}
        history = gr.State([])
        gallery = gr.Gallery(
            label="History: click to use again",
            format="png",
            interactive=False,
            columns=8,
            fit_columns=False,
            height=190,
            object_fit="contain",
            allow_preview=False,
            visible=False,
            buttons=[],
            elem_id="history",
            elem_classes="images",
        )
        for tab in made.values():
            _connect(studio, tab, history, gallery)
        _connect_history(made, tabs, history, gallery)
        page.unload(_leaver(studio))
    return page


def launch(
    page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options: Any
) -> Any:
    """Serve a page; waits until interrupted unless ``prevent_thread_lock`` is given.

    Raises:
        OSError: if the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is there
    # Fonts of the system: none are fetched from the net.
    theme = Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        **options,
    )


def check_port(host: str, port: int) -> None:
    """Raises OSError if the port is taken, ValueError if there is none, before a model is loaded for it."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; it must lie between 0 and {2**16 - 1}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port} ({error.strerror}); pass another --port or --host"
            ) from error


@contextmanager
def messages() -> Iterator[None]:
    """What the user can mend is a message on the page."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "choose a smaller size, fewer pictures or references, or start the page with --quantize or --offload"
        raise _message(f"The GPU has not enough memory: {remedy}") from error
    except (ValueError, TypeError, OSError) as error:
        raise _message(str(error)) from error


def _message(text: str) -> gr.Error:
    # Gradio reads messages as HTML, and ours speak of <image 1>.
    return gr.Error(html.escape(text), duration=None, title="Please check", print_exception=False)


def _headline(pipe: Echo4oPipeline, studio: Studio) -> str:
    model, weight = studio.model, pipe.model.language_model.lm_head.weight
    parts = [model.name, str(weight.device), model.quantize or str(weight.dtype).removeprefix("torch.")]
    if pipe.model.config.visual_gen:
        parts.append(f"up to {studio.limits.side} × {studio.limits.side} px")
    return html.escape(" · ".join(part for part in parts if part))


def _connect(studio: Studio, tab: Tab, history: gr.State, gallery: gr.Gallery) -> None:
    """Generate and Cancel of a tab."""
    seed = tab.controls.by_name["seed"]
    outputs = [*tab.outputs, seed, history, gallery]

    def begin(request: gr.Request) -> list[Any]:
        studio.begin(_key(request, tab))
        return [gr.Button(interactive=False), gr.Button(variant="stop", interactive=True)]

    def run(
        request: gr.Request,
        past: list[Result],
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio knows it by this default)
        *values: Any,
    ) -> list[Any]:
        try:
            with messages():
                results = studio.run(tab.job(values), _key(request, tab), _reporter(progress))
        except Cancelled:
            gr.Info("Cancelled", duration=4)
            return [gr.skip() for _ in outputs]
        except gr.Error as error:  # as a warning: an error would cover the last result
            gr.Warning(error.message, duration=None, title="Please check")
            return [gr.skip() for _ in outputs]
        past = [*reversed(results), *past][:HISTORY]
        shown = gr.Gallery([thumbnail(result) for result in past], visible=True, selected_index=None)
        return [*tab.shown(results), results[0].seed, past, shown]

    def end() -> list[Any]:
        return [gr.Button(interactive=True), gr.Button(variant="secondary", interactive=False)]

    def cancel(request: gr.Request) -> gr.Button:
        studio.cancel(_key(request, tab))
        return gr.Button(interactive=False)

    buttons = [tab.generate, tab.cancel]
    started = gr.on([tab.generate.click, tab.prompt.submit], begin, None, buttons, **QUICK)
    ran = started.then(
        run,
        [history, *tab.inputs],
        outputs,
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=tab.outputs[0],
        api_visibility="private",
    )
    # Not `then`: in Gradio 6.31 it does not follow an error.
    ran.success(end, None, buttons, **QUICK)
    ran.failure(end, None, buttons, **QUICK)
    tab.cancel.click(cancel, None, tab.cancel, **QUICK)


def _connect_history(tabs: dict[str, Tab], row: gr.Tabs, history: gr.State, gallery: gr.Gallery) -> None:
    """A click on a result puts all of its job back into its tab."""

    def reuse(past: list[Result], event: gr.SelectData) -> dict[Any, Any]:
        result = past[event.index]
        return {row: gr.Tabs(selected=result.job.task), **tabs[result.job.task].restored(result)}

    targets = [component for tab in tabs.values() for component in [*tab.inputs, *tab.outputs]]
    gallery.select(reuse, history, [row, *targets], **QUICK)


def _reporter(progress: gr.Progress) -> Callable[[int, int | None, str], None]:
    def report(done: int, total: int | None, unit: str) -> None:
        if total is not None:
            progress((done, total), desc="Drawing", unit=unit)
        elif unit == "words":
            progress((done, None), desc="Writing", unit=unit)
        else:
            progress(0, desc="Reading")

    return report


def _key(request: gr.Request, tab: Tab) -> str:
    return f"{request.session_hash}/{tab.task}"


def _leaver(studio: Studio) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        studio.leave(f"{request.session_hash}/")

    return leave
