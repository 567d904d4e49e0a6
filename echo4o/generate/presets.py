"""Published settings by task, as BAGEL's and Echo-4o's notebooks state them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches

from echo4o.generate.sampler import Guidance


@dataclass(frozen=True)
class Settings:
    """Everything about one request but its content.

    Attributes:
        guidance: see `Guidance`.
        num_timesteps: points of the time grid; one fewer network evaluations.
        timestep_shift: above 1 spends more steps on layout, below on details.
        size_from: ``first``, ``last`` or the number (from 1) of the reference whose resized size the output takes.
        max_think_tokens: bos and thought together, as upstream counts.
        do_sample, temperature, top_p: of generated text; greedy by default.
        taylorseer: compute about 40 % of the steps and forecast the others (`TaylorSeer`).
        branch_cache: compute the guidance branches only in one step of so many and use their differences again.
    """

    guidance: Guidance = field(default_factory=Guidance)
    num_timesteps: int = 50
    timestep_shift: float = 3.0
    size_from: str | int = "last"
    max_think_tokens: int = 1000
    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0
    taylorseer: bool = False
    branch_cache: int = 1

    def __post_init__(self) -> None:
        if self.do_sample and not 1e-3 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0.001 or more, or set do_sample to False")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; it must be at least 2")
        if not 0 < self.timestep_shift < math.inf:
            raise ValueError(f"timestep_shift is {self.timestep_shift}; it must be above 0 and finite")
        if isinstance(self.size_from, str) and self.size_from not in ("first", "last"):
            raise ValueError(f"size_from is {self.size_from!r}; use first, last or the number of a reference")
        for name in ("max_think_tokens", "branch_cache"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and be at most 1")

    def changed(self, **overrides) -> Settings:
        """With some settings replaced, guidance fields included.

        Raises:
            TypeError: naming an unknown setting and the known ones.
        """
        of_guidance = {f.name for f in fields(Guidance)}
        own = {f.name for f in fields(Settings)} - {"guidance"}
        if unknown := set(overrides) - of_guidance - own:
            name = sorted(unknown)[0]
            near = get_close_matches(name, of_guidance | own, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(of_guidance | own))}"
            raise TypeError(f"unknown setting {name!r}; {hint}")
        guided = replace(self.guidance, **{k: v for k, v in overrides.items() if k in of_guidance})
        return replace(self, guidance=guided, **{k: v for k, v in overrides.items() if k in own})


PRESETS = {
    "t2i": Settings(Guidance(4.0, 1.0, (0.4, 1.0), "global")),
    "edit": Settings(Guidance(4.0, 2.0, (0.0, 1.0), "text_channel")),
    "multi_ref": Settings(Guidance(4.0, 2.0, (0.0, 1.0), "text_channel")),
    "understand": Settings(),
}


def preset(name: str) -> Settings:
    """Settings by task.

    Raises:
        ValueError: for an unknown task.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
