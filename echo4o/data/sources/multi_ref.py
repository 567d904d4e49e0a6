"""Multi-reference rows: several reference images and an instruction make one target image.

Upstream parquet holds ``image_list`` (references in order, the target last) and ``instruction_list``; native JSONL
holds ``{"instruction", "input_images": […], "output_image"}`` with paths or embedded bytes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import fit_pixels, printable
from echo4o.data.sources.columns import (
    INPUT_IMAGES,
    INSTRUCTION,
    OUTPUT_IMAGE,
    columns_found,
    instruction_of,
    references_and_target,
)
from echo4o.data.sources.drafts import Drafter, Picture, PictureReader, SegmentDraft
from echo4o.data.sources.references import names_beyond, split_inline, surely_renumbered

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MultiRefOptions:
    """Group keys of the dataset YAML beyond upstream's; the defaults give upstream's plan.

    Attributes:
        max_refs: rows with more references are skipped and counted, or cut to the first ones (`max_refs_policy`:
            ``skip`` or ``truncate``). Rows whose instruction names a reference that was cut are skipped and counted.
        max_pixels_by_num_refs: pixel budget of each reference by the number of references of the row: a list for 1, 2,
            … references whose last value repeats, or a mapping count → budget, where a count between two entries takes
            the budget of the lower one and counts below the first entry take the first budget. It applies to the VAE
            and the ViT image of references, on top of the transforms, by the square-root rule; the target keeps its
            size.
        inline_references: references stand where ``<image>`` or ``<image N>`` names them instead of all in front.
        shuffle_references: random order of the references, the instruction's numbers rewritten to match. Rows whose
            instruction may name references in words that are not understood ("the second one", "image A") keep the
            given order.
        noise_copies: times the target is laid down, each with noise and time step of its own.
        allow_no_references: a row whose column of references is there but empty, or whose ``image_list`` holds the
            target alone, trains as text-to-image. Otherwise, and wherever no such column is found, it is a bad row.
        vae_on_references, vit_on_references: lay down the VAE and the ViT image of references.
    """

    max_refs: int | None = None
    max_refs_policy: str = "skip"
    max_pixels_by_num_refs: Sequence[int] | Mapping[int, int] = ()
    inline_references: bool = False
    shuffle_references: bool = False
    noise_copies: int = 1
    allow_no_references: bool = False
    vae_on_references: bool = True
    vit_on_references: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_pixels_by_num_refs", _budgets(self.max_pixels_by_num_refs))
        if self.max_refs_policy not in ("skip", "truncate"):
            raise DataError(f"max_refs_policy is {self.max_refs_policy!r}; known: skip, truncate")
        if self.noise_copies < 1:
            raise DataError(f"noise_copies must be at least 1, not {self.noise_copies}")
        if self.max_refs is not None and self.max_refs < 1:
            raise DataError(f"max_refs must be at least 1, not {self.max_refs}")
        if not (self.vae_on_references or self.vit_on_references):
            raise DataError("vae_on_references and vit_on_references are both false: references would be invisible")


@dataclass(frozen=True)
class MultiRefPlanner:
    """References (VAE and ViT image each, droppable), instruction (droppable), target (loss)."""

    drafter: Drafter
    options: MultiRefOptions
    visual_und: bool = True
    columns: ClassVar[tuple[str, ...]] = (*INSTRUCTION, *INPUT_IMAGES, *OUTPUT_IMAGE)
    images_vary: ClassVar[bool] = False

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        given, target = references_and_target(row)
        if not given and not (self.options.allow_no_references and any(name in row for name in INPUT_IMAGES)):
            raise RowError("no references", detail=f"{columns_found(row)}; references are read from input_images")
        images = self._limited(given)
        instruction = instruction_of(row, rng)
        if len(images) < len(given) and names_beyond(instruction, len(images), len(given)):
            raise RowError(
                "instruction names a removed reference",
                detail=f"max_refs keeps {len(images)} of {len(given)}: {printable(instruction[:80])}",
            )
        if self.options.shuffle_references:
            order = rng.sample(range(len(images)), len(images))
            rewritten = surely_renumbered(instruction, [order.index(old) + 1 for old in range(len(images))])
            if rewritten is None:
                _log.debug("given order kept: %s may name references in other words", printable(instruction[:80]))
            else:
                images = [images[old] for old in order]
                instruction = rewritten

        parts: list[str | int] = [*range(len(images)), instruction]
        if self.options.inline_references:
            parts = split_inline(instruction, len(images))

        references = [pictures(image) for image in images]
        drafts: list[SegmentDraft] = []
        for part in parts:
            if isinstance(part, int):
                drafts += self._reference(references[part], len(images))
            else:
                drafts.append(self.drafter.text(part, droppable=True))
        copy = self.drafter.vae_image(pictures(target), loss=True, droppable=False)
        return drafts + [copy] * self.options.noise_copies

    def images(self, row: Mapping[str, Any], pictures: PictureReader) -> list[SegmentDraft]:
        given, target = references_and_target(row)
        images = self._limited(given)
        references = [draft for image in images for draft in self._reference(pictures(image), len(images))]
        return [*references, self.drafter.vae_image(pictures(target), loss=True, droppable=False)]

    def resize_rules(self) -> dict[str, Any]:
        budgets = {"max_pixels_by_num_refs": list(self.options.max_pixels_by_num_refs)}  # type: ignore[arg-type]
        return {kind: rule | budgets for kind, rule in self.drafter.resize_rules().items()}

    def _limited(self, images: list[Any]) -> list[Any]:
        limit = self.options.max_refs
        if limit is None or len(images) <= limit:
            return images
        if self.options.max_refs_policy == "truncate":
            return images[:limit]
        raise RowError("too many references", detail=f"{len(images)} references; max_refs is {limit}")

    def _reference(self, picture: Picture, num_references: int) -> list[SegmentDraft]:
        budgets = tuple(self.options.max_pixels_by_num_refs)
        shrink = partial(_fit, budget=budgets[min(num_references, len(budgets)) - 1]) if budgets else None
        drafts = []
        if self.options.vae_on_references:
            drafts.append(self.drafter.vae_image(picture, loss=False, droppable=True, shrink=shrink))
        if self.options.vit_on_references and self.visual_und:
            drafts.append(self.drafter.vit_image(picture, droppable=True, shrink=shrink))
        return drafts


def _budgets(value: Any) -> tuple[int, ...]:
    """Budgets for 1, 2, … references. Raises DataError unless they, and the counts of a mapping, are whole numbers."""
    if value is None:
        return ()
    if not isinstance(value, Mapping | list | tuple):
        raise DataError(f"max_pixels_by_num_refs must be a list or a mapping count → pixels, not {value!r}")
    counts, budgets = (value.keys(), value.values()) if isinstance(value, Mapping) else ((), value)
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in (*counts, *budgets)):
        raise DataError(f"max_pixels_by_num_refs must hold positive whole numbers: {value}")
    if not isinstance(value, Mapping) or not value:
        return tuple(budgets)
    filled = []
    budget = value[min(value)]
    for count in range(1, max(value) + 1):
        budget = value.get(count, budget)
        filled.append(budget)
    return tuple(filled)


def _fit(width: int, height: int, stride: int, *, budget: int) -> tuple[int, int]:
    return fit_pixels(width, height, budget, stride)
