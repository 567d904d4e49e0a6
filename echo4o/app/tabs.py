"""One tab: what goes in on the left, what comes out on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from echo4o.app.controls import QUICK, Controls, answer_controls, drawing_controls
from echo4o.app.parameters import LAST, Limits, size_choices
from echo4o.app.references import Items, References
from echo4o.app.studio import Job, Result

TITLES = {"t2i": "Text → Image", "multi_ref": "Multi-reference", "edit": "Edit", "understand": "Understand"}
HINTS = {
    "t2i": "A red cube on a wooden table",
    "multi_ref": "The cat of image 1 on the sofa of image 2",
    "edit": "Make the sky orange",
    "understand": "What is in image 1?",
}


@dataclass
class Tab:
    """Components of a tab: what a job is made of, and where its results go."""

    task: str
    limits: Limits
    prompt: gr.Textbox
    references: Any  # gallery or image; None without
    controls: Controls
    pictures: gr.Gallery | None
    text: gr.Textbox
    summary: gr.Markdown
    generate: gr.Button
    cancel: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [self.prompt, *([self.references] if self.references else []), *self.controls.components]

    @property
    def outputs(self) -> list[Any]:
        return [*([self.pictures] if self.pictures else []), self.text, self.summary]

    def job(self, values: Sequence[Any]) -> Job:
        """What the values of the inputs ask for."""
        prompt, *rest = values
        found = rest.pop(0) if self.references else None
        paths = (found,) if isinstance(found, str) else tuple(path for path, _ in found or ())
        return Job(self.task, prompt or "", paths, self.controls.values(rest))

    def shown(self, results: Sequence[Result]) -> list[Any]:
        """Values of the outputs."""
        pictures = [(result.picture, f"seed {result.seed}" if len(results) > 1 else None) for result in results]
        text = "\n\n".join(dict.fromkeys(result.text for result in results if result.text))
        visible = self.task == "understand" or bool(text)
        if self.task == "understand" and not text:
            text = "(no answer)"
        return [
            *([gr.Gallery(pictures, selected_index=0)] if self.pictures else []),
            gr.Textbox(text, visible=visible),
            summary(results),
        ]

    def restored(self, result: Result) -> dict[Any, Any]:
        """Values of all components, such that the tab is as it was for this result."""
        job = result.job
        values: dict[Any, Any] = {self.prompt: job.prompt, **dict(zip(self.outputs, self.shown([result]), strict=True))}
        values |= {component: job.values[name] for name, component in self.controls.by_name.items()}
        if self.references:
            named = [(path, f"image {number}") for number, path in enumerate(job.references, start=1)]
            values[self.references] = job.references[0] if self.task == "edit" else named
        if self.task == "multi_ref":
            choices = size_choices(self.limits, len(job.references))
            values[self.controls.by_name["size"]] = gr.Dropdown(choices, value=job.values["size"])
        return values


def summary(results: Sequence[Result]) -> str:
    """One line: seeds, size, seconds."""
    first, last = results[0], results[-1]
    parts = [f"{first.seconds:.1f} s"]
    if first.size is not None:
        parts.insert(0, f"{first.size[0]} × {first.size[1]} px")
    if first.size is not None or first.job.values["do_sample"]:
        parts.insert(0, f"Seed {first.seed}" if len(results) == 1 else f"Seeds {first.seed}–{last.seed}")
    return " · ".join(parts)


def build_tab(task: str, limits: Limits, guard: Callable[[], Any]) -> Tab:
    """Lay a tab out.

    Args:
        guard: turns a user's mistake inside it into a message on the page.
    """
    answers = task == "understand"
    references = image = None
    with gr.Tab(TITLES[task], id=task), gr.Row():
        with gr.Column(scale=5, min_width=320):
            if task in ("multi_ref", "understand"):
                references = References(task, guard)
            elif task == "edit":
                sources: Any = ["upload", "clipboard"]
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=sources,
                    height=260,
                    buttons=[],
                    elem_id="edit_image",
                )
            prompt = gr.Textbox(
                label="Question" if answers else "Prompt",
                placeholder=HINTS[task],
                lines=2,
                max_lines=8,
                elem_id=f"{task}_prompt",
            )
            with gr.Row():
                label = "Answer" if answers else "Generate"
                generate = gr.Button(label, variant="primary", scale=3, min_width=120, elem_id=f"{task}_generate")
                cancel = gr.Button("Cancel", scale=1, min_width=80, interactive=False, elem_id=f"{task}_cancel")
            if answers:
                controls = answer_controls(task)
            else:
                controls = drawing_controls(task, limits, None if task == "t2i" else 0)
        with gr.Column(scale=6, min_width=320):
            pictures = None
            if not answers:
                pictures = gr.Gallery(
                    label="Result",
                    format="png",
                    interactive=False,
                    columns=2,
                    height=480,
                    object_fit="contain",
                    preview=True,
                    buttons=["download", "fullscreen"],
                    elem_id=f"{task}_pictures",
                )
            text = gr.Textbox(
                label="Answer" if answers else "Thought",
                lines=10 if answers else 3,
                max_lines=20,
                interactive=False,
                visible=answers,
                buttons=["copy"],
                elem_id=f"{task}_text",
            )
            line = gr.Markdown("", elem_classes="summary", elem_id=f"{task}_summary")
    if references is not None:
        references.connect(prompt)
    if task == "multi_ref" and references is not None:
        size = controls.by_name["size"]
        references.gallery.change(_follow(limits), [references.gallery, size], size, **QUICK)
    gallery = references.gallery if references is not None else image
    return Tab(task, limits, prompt, gallery, controls, pictures, text, line, generate, cancel)


def _follow(limits: Limits) -> Callable[[Items | None, str], Any]:
    """The size menu for the references there are; one that is gone is not chosen any more."""

    def follow(items: Items | None, size: str) -> Any:
        choices = size_choices(limits, len(items or ()))
        return gr.Dropdown(choices, value=size if size in [value for _, value in choices] else LAST)

    return follow


def thumbnail(result: Result) -> tuple[str | Path, str]:
    """(picture, caption) of a result in the history."""
    words = " ".join(result.job.prompt.split())
    words = words if len(words) <= 60 else words[:59] + "…"
    if result.picture is None:
        return result.job.references[0], f"{words} → {result.text[:40]}"
    return result.picture, f"{result.seed} · {words}"
