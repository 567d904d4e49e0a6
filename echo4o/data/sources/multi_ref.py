"""Multi-reference rows: several reference images and an instruction make one target image.

Upstream parquet holds ``image_list`` (references in order, the target last) and ``instruction_list``; native JSONL
holds ``{"instruction", "input_images": […], "output_image"}`` with paths or embedded bytes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from echo4o.data.errors import DataError, RowError
from echo4o.data.images import fit_pixels
from echo4o.data.sources.columns import INPUT_IMAGES, INSTRUCTION, OUTPUT_IMAGE, instruction_of, references_and_target
from echo4o.data.sources.drafts import Drafter, Picture, PictureReader, SegmentDraft
from echo4o.data.sources.references import renumber, split_inline


@dataclass(frozen=True)
class MultiRefOptions:
    """Group keys of the dataset YAML beyond upstream's; the defaults give upstream's plan.

    Attributes:
        max_refs: rows with more references are skipped and counted, or cut to the first ones (`max_refs_policy`:
            ``skip`` or ``truncate``).
        max_pixels_by_num_refs: pixel budget of each reference by the number of references of the row; the last value
            repeats. It applies to the VAE and the ViT image of references, on top of the transforms, by the square-root
            rule; the target keeps its size.
        inline_references: references stand where ``<image>`` or ``<image N>`` names them instead of all in front.
        shuffle_references: random order of the references, the instruction's numbers rewritten to match.
        noise_copies: times the target is laid down, each with noise and time step of its own.
        vae_on_references, vit_on_references: lay down the VAE and the ViT image of references.
    """

    max_refs: int | None = None
    max_refs_policy: str = "skip"
    max_pixels_by_num_refs: tuple[int, ...] = ()
    inline_references: bool = False
    shuffle_references: bool = False
    noise_copies: int = 1
    vae_on_references: bool = True
    vit_on_references: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_pixels_by_num_refs", tuple(self.max_pixels_by_num_refs or ()))
        if self.max_refs_policy not in ("skip", "truncate"):
            raise DataError(f"max_refs_policy is {self.max_refs_policy!r}; known: skip, truncate")
        if self.noise_copies < 1:
            raise DataError(f"noise_copies must be at least 1, not {self.noise_copies}")
        if self.max_refs is not None and self.max_refs < 1:
            raise DataError(f"max_refs must be at least 1, not {self.max_refs}")
        if any(not isinstance(budget, int) or budget < 1 for budget in self.max_pixels_by_num_refs):
            raise DataError(f"max_pixels_by_num_refs must hold positive pixel counts: {self.max_pixels_by_num_refs}")
        if not (self.vae_on_references or self.vit_on_references):
            raise DataError("vae_on_references and vit_on_references are both false: references would be invisible")


@dataclass(frozen=True)
class MultiRefPlanner:
    """References (VAE and ViT image each, droppable), instruction (droppable), target (loss)."""

    drafter: Drafter
    options: MultiRefOptions
    visual_und: bool = True
    columns: ClassVar[tuple[str, ...]] = (*INSTRUCTION, *INPUT_IMAGES, *OUTPUT_IMAGE)

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        images, target = references_and_target(row)
        images = self._limited(images)
        instruction = instruction_of(row, rng)
        if self.options.shuffle_references:
            order = rng.sample(range(len(images)), len(images))
            images = [images[old] for old in order]
            instruction = renumber(instruction, [order.index(old) + 1 for old in range(len(images))])

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

    def _limited(self, images: list[Any]) -> list[Any]:
        limit = self.options.max_refs
        if limit is None or len(images) <= limit:
            return images
        if self.options.max_refs_policy == "truncate":
            return images[:limit]
        raise RowError("too many references", detail=f"{len(images)} references; max_refs is {limit}")

    def _reference(self, picture: Picture, num_references: int) -> list[SegmentDraft]:
        budgets = self.options.max_pixels_by_num_refs
        shrink = partial(_fit, budget=budgets[min(num_references, len(budgets)) - 1]) if budgets else None
        drafts = []
        if self.options.vae_on_references:
            drafts.append(self.drafter.vae_image(picture, loss=False, droppable=True, shrink=shrink))
        if self.options.vit_on_references and self.visual_und:
            drafts.append(self.drafter.vit_image(picture, droppable=True, shrink=shrink))
        return drafts


def _fit(width: int, height: int, stride: int, *, budget: int) -> tuple[int, int]:
    return fit_pixels(width, height, budget, stride)
