"""The parameters of a tab: what the page offers, from the model's limits and the published presets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.presets import preset

#: width : height, as BAGEL's own page offers them
RATIOS = {"1:1": (1, 1), "4:3": (4, 3), "3:4": (3, 4), "16:9": (16, 9), "9:16": (9, 16)}
PRESET_LABELS = {"t2i": "Text to image", "edit": "Edit", "multi_ref": "Multi-reference"}
WHOLE = ("num_timesteps", "max_think_tokens", "branch_cache", "num_images", "width", "height")
CUSTOM, LAST = "custom", "last"
MAX_SEED = 2**31 - 1

#: Controls that hold a number, as the page names them.
NUMBERS = {
    "width": "Width (px)",
    "height": "Height (px)",
    "num_images": "Pictures",
    "num_timesteps": "Time steps",
    "cfg_text_scale": "Text guidance",
    "cfg_img_scale": "Image guidance",
    "interval_from": "Guided from time",
    "interval_to": "Guided to time",
    "cfg_renorm_min": "Renorm minimum",
    "timestep_shift": "Time shift",
    "branch_cache": "Guide anew every",
    "max_think_tokens": "Longest text (tokens)",
    "temperature": "Temperature",
    "top_p": "Top p",
}

#: Fields of `Settings` and `Guidance` that go to the pipeline under their own names.
OF_TEXT = ("max_think_tokens", "do_sample", "temperature", "top_p")
OF_IMAGES = (
    *("num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_type", "cfg_renorm_min"),
    *OF_TEXT,
    *("taylorseer", "branch_cache"),
)


@dataclass(frozen=True)
class Limits:
    """Output sizes a model can draw.

    Attributes:
        side: longest side in pixels.
        stride: sides are multiples of it.
    """

    side: int
    stride: int

    @classmethod
    def of(cls, pipe: Echo4oPipeline) -> Limits:
        config = pipe.model.config
        return cls(config.max_latent_size * config.latent_downsample, config.latent_downsample)

    def size(self, ratio: str) -> tuple[int, int]:
        """(width, height) of a ratio, its longer side being the longest there is."""
        parts = RATIOS[ratio]
        scaled = (self.side * part / max(parts) for part in parts)
        width, height = (max(self.stride, round(side / self.stride) * self.stride) for side in scaled)
        return width, height


def size_choices(limits: Limits, num_references: int | None) -> list[tuple[str, str]]:
    """(label, value) of the size menu.

    Args:
        num_references: None where there can be none.
    """
    of_references = []
    if num_references is not None:
        of_references = [("As last reference" if num_references > 1 else "As reference", LAST)]
    if num_references is not None and num_references > 1:
        of_references += [(f"As image {number}", str(number)) for number in range(1, num_references + 1)]
    ratios = [(f"{ratio} · {w} × {h}", ratio) for ratio in RATIOS for w, h in [limits.size(ratio)]]
    return [*of_references, *ratios, ("Custom", CUSTOM)]


def preset_values(name: str) -> dict[str, Any]:
    """A preset as values of the controls."""
    settings = preset(name)
    low, high = settings.guidance.cfg_interval
    values = {key: getattr(settings if hasattr(settings, key) else settings.guidance, key) for key in OF_IMAGES}
    return {**values, "interval_from": low, "interval_to": high}


def chosen_seed(values: Mapping[str, Any]) -> int:
    """The seed in the field, or a new one where a random one is wanted; of several pictures the first one's.

    Raises:
        ValueError: for a seed that is no whole number from 0, or leaves no seeds for the other pictures.
    """
    count = number_of(values, "num_images") if "num_images" in values else 1
    largest = MAX_SEED - count + 1
    if values.get("random_seed"):
        return random.SystemRandom().randint(0, largest)
    seed = values.get("seed")
    if seed is None or seed != int(seed) or not 0 <= seed <= largest:
        several = f" for {count} pictures" if count > 1 else ""
        raise ValueError(f"Seed must be a whole number from 0 to {largest}{several}, or tick Random seed")
    return int(seed)


def number_of(values: Mapping[str, Any], name: str) -> Any:
    """A field's number, whole where it must be: sliders give whole numbers as floats after a drag.

    Raises:
        ValueError: if the field is empty.
    """
    if values[name] is None:
        raise ValueError(f"{NUMBERS[name]} is empty: enter a number")
    return int(values[name]) if name in WHOLE else values[name]


def pipeline_keywords(values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Values of the controls as keywords of a pipeline call."""
    keywords = _numbers(values, OF_IMAGES)
    keywords["cfg_interval"] = (number_of(values, "interval_from"), number_of(values, "interval_to"))
    keywords["think"] = values["think"]
    size = values["size"]
    if size == CUSTOM:
        keywords |= {name: number_of(values, name) for name in ("width", "height")}
    elif size in RATIOS:
        keywords["width"], keywords["height"] = limits.size(size)
    else:
        keywords["size_from"] = LAST if size == LAST else int(size)
    return keywords


def answer_keywords(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the controls as keywords of a question."""
    return {"think": values["think"], **_numbers(values, OF_TEXT)}


def _numbers(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: number_of(values, name) if name in NUMBERS else values[name] for name in names}
