"""Edit rows: ``image_list`` holds a source and its successive edits, ``instruction_list[j]`` paraphrases of step j."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from echo4o.data.errors import RowError
from echo4o.data.sources.columns import (
    INPUT_IMAGES,
    INSTRUCTION,
    OUTPUT_IMAGE,
    as_list,
    first_of,
    pick_phrase,
    references_and_target,
)
from echo4o.data.sources.drafts import Drafter, Picture, PictureReader, SegmentDraft

_MAX_HOPS = 2


@dataclass(frozen=True)
class EditPlanner:
    """One or two consecutive edits of a row, chosen at random as upstream does.

    The source is a condition (VAE and ViT image). Two hops are, half of the time, told in one instruction with a single
    target; otherwise every hop has its instruction, and the image between stands three times: as a target, as a clean
    VAE image and as a ViT image.
    """

    drafter: Drafter
    visual_und: bool = True
    columns: ClassVar[tuple[str, ...]] = (*INSTRUCTION, *INPUT_IMAGES, *OUTPUT_IMAGE)
    images_vary: ClassVar[bool] = True

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        sources, target = references_and_target(row)
        images = [*sources, target]
        steps = self._steps(row, len(images))
        start = rng.randrange(len(images) - 1)
        end = rng.randint(start + 1, min(start + _MAX_HOPS, len(images) - 1))

        drafts = self._condition(pictures(images[start]))
        if end - start > 1 and rng.random() < 0.5:
            # Upstream's quirk, kept: at the end of the chain the last hop is left out.
            end -= end == len(images) - 1
            phrases = [pick_phrase(steps[hop], rng) for hop in range(start, end)]
            drafts.append(self.drafter.text(". ".join(phrases), droppable=True))
            return [*drafts, self._target(pictures(images[end]))]
        for hop in range(start, end):
            drafts.append(self.drafter.text(pick_phrase(steps[hop], rng), droppable=True))
            edited = pictures(images[hop + 1])
            drafts.append(self._target(edited))
            if hop + 1 != end:
                drafts += self._condition(edited)
        return drafts

    def images(self, row: Mapping[str, Any], pictures: PictureReader) -> list[SegmentDraft]:
        sources, target = references_and_target(row)
        return [draft for image in (*sources, target) for draft in self._condition(pictures(image))]

    def resize_rules(self) -> dict[str, Any]:
        return self.drafter.resize_rules()

    @staticmethod
    def _steps(row: Mapping[str, Any], num_images: int) -> list[Any]:
        if num_images < 2:
            raise RowError("too few images", detail=f"an edit needs a source and a result; the row has {num_images}")
        _, steps = first_of(row, INSTRUCTION)
        steps = [] if steps is None else as_list(steps)
        if len(steps) < num_images - 1:
            raise RowError("instruction missing", detail=f"{len(steps)} instructions for {num_images - 1} edits")
        return steps

    def _condition(self, picture: Picture) -> list[SegmentDraft]:
        drafts = [self.drafter.vae_image(picture, loss=False, droppable=True)]
        if self.visual_und:
            drafts.append(self.drafter.vit_image(picture, droppable=True))
        return drafts

    def _target(self, picture: Picture) -> SegmentDraft:
        return self.drafter.vae_image(picture, loss=True, droppable=False)
