"""The closed accordion of a tab: every parameter as a control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from echo4o.app.parameters import (
    CUSTOM,
    MAX_SEED,
    NUMBERS,
    PRESET_LABELS,
    Limits,
    preset_values,
    size_choices,
)
from echo4o.generate.presets import PRESETS
from echo4o.generate.sampler import RENORM_TYPES

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Controls:
    """The controls of a tab by name, in the order their values are passed on."""

    by_name: dict[str, Any] = field(default_factory=dict)

    @property
    def components(self) -> list[Any]:
        return list(self.by_name.values())

    def values(self, values: tuple[Any, ...] | list[Any]) -> dict[str, Any]:
        return dict(zip(self.by_name, values, strict=True))


def drawing_controls(task: str, limits: Limits, num_references: int | None) -> Controls:
    """Controls of a tab that draws, at its preset's values.

    Args:
        num_references: at the beginning; None where there can be none.
    """
    start, made = preset_values(task), {}
    sizes = size_choices(limits, num_references)
    with gr.Accordion("Parameters", open=False, elem_id=f"{task}_parameters"):
        with gr.Row():
            presets = [(label, name) for name, label in PRESET_LABELS.items() if name in PRESETS]
            preset = gr.Dropdown(presets, value=task, label="Preset", min_width=120, elem_id=f"{task}_preset")
            made["size"] = gr.Dropdown(sizes, value=sizes[0][1], label="Size", min_width=120, elem_id=f"{task}_size")
        with gr.Row(visible=False) as custom:
            side = min(1024, limits.side)
            made["width"] = _slider("width", limits.stride, limits.side, limits.stride, side)
            made["height"] = _slider("height", limits.stride, limits.side, limits.stride, side)
        _seed_row(task, made)
        with gr.Row():
            made["num_images"] = _slider("num_images", 1, 8, 1, 1, f"{task}_num_images")
            made["num_timesteps"] = _slider("num_timesteps", 2, 100, 1, start["num_timesteps"], f"{task}_num_timesteps")
        with gr.Row():
            made["cfg_text_scale"] = _slider("cfg_text_scale", 1, 10, 0.1, start["cfg_text_scale"])
            made["cfg_img_scale"] = _slider("cfg_img_scale", 1, 5, 0.1, start["cfg_img_scale"])
        with gr.Row():
            made["interval_from"] = _slider("interval_from", 0, 1, 0.05, start["interval_from"])
            made["interval_to"] = _slider("interval_to", 0, 1, 0.05, start["interval_to"])
        with gr.Row():
            renorm = start["cfg_renorm_type"]
            made["cfg_renorm_type"] = gr.Dropdown(list(RENORM_TYPES), value=renorm, label="Renorm", min_width=120)
            made["cfg_renorm_min"] = _slider("cfg_renorm_min", 0, 1, 0.05, start["cfg_renorm_min"])
        with gr.Row():
            made["timestep_shift"] = _slider("timestep_shift", 0.5, 10, 0.1, start["timestep_shift"])
            made["branch_cache"] = _slider("branch_cache", 1, 5, 1, start["branch_cache"])
        made["taylorseer"] = gr.Checkbox(start["taylorseer"], label="TaylorSeer: forecast most steps")
        _text_rows(task, made, start, "Think first")
    made["size"].change(lambda size: gr.Row(visible=size == CUSTOM), made["size"], custom, **QUICK)
    filled = {name: made[name] for name in preset_values(task)}

    def fill(name: str) -> list[Any]:
        values = preset_values(name)
        return [values[key] for key in filled]

    preset.input(fill, preset, list(filled.values()), **QUICK)
    return Controls(made)


def answer_controls(task: str) -> Controls:
    """Controls of questions."""
    start, made = {**preset_values(task), "max_think_tokens": 512}, {}
    with gr.Accordion("Parameters", open=False, elem_id=f"{task}_parameters"):
        _seed_row(task, made)
        _text_rows(task, made, start, "Think first", always=True)
    return Controls(made)


def _seed_row(task: str, made: dict[str, Any]) -> None:
    with gr.Row():
        made["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id=f"{task}_seed"
        )
        made["random_seed"] = gr.Checkbox(False, label="Random seed", min_width=120, elem_id=f"{task}_random_seed")


def _text_rows(task: str, made: dict[str, Any], start: dict[str, Any], label: str, always: bool = False) -> None:
    """Of written text; without `always` only seen when there is a thought."""
    made["think"] = gr.Checkbox(False, label=label, elem_id=f"{task}_think")
    with gr.Column(visible=always) as writing:
        with gr.Row():
            made["max_think_tokens"] = _slider(
                "max_think_tokens", 16, 4096, 1, start["max_think_tokens"], f"{task}_max_think_tokens"
            )
            made["do_sample"] = gr.Checkbox(start["do_sample"], label="Sample words", min_width=120)
        with gr.Row():
            made["temperature"] = _slider("temperature", 0.05, 2, 0.05, start["temperature"])
            made["top_p"] = _slider("top_p", 0.05, 1, 0.05, start["top_p"])
    if not always:
        made["think"].change(lambda think: gr.Column(visible=think), made["think"], writing, **QUICK)


def _slider(name: str, low: float, high: float, step: float, value: float, elem_id: str | None = None) -> gr.Slider:
    label = NUMBERS[name]
    return gr.Slider(low, high, value=value, step=step, label=label, min_width=120, buttons=[], elem_id=elem_id)
