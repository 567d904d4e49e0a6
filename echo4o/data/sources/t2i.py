"""Text-to-image rows: ``image`` and ``captions``, a JSON object of which one value is drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from echo4o.data.errors import RowError
from echo4o.data.sources.columns import OUTPUT_IMAGE, as_list, first_of, pick_phrase
from echo4o.data.sources.drafts import Drafter, PictureReader, SegmentDraft

_CAPTION = ("caption", "instruction", "prompt", "text")
_IMAGE = ("image", *OUTPUT_IMAGE)


@dataclass(frozen=True)
class T2IPlanner:
    """Caption (droppable), then the image (loss). No caption at all is a single space, as upstream."""

    drafter: Drafter
    columns: ClassVar[tuple[str, ...]] = ("captions", *_CAPTION, *_IMAGE)
    images_vary: ClassVar[bool] = False

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        images = self.images(row, pictures)
        return [self.drafter.text(self._caption(row, rng), droppable=True), *images]

    def images(self, row: Mapping[str, Any], pictures: PictureReader) -> list[SegmentDraft]:
        _, image = first_of(row, _IMAGE)
        if image is None:
            raise RowError("no images")
        if isinstance(image, list):
            if len(image) != 1:
                raise RowError("wrong column type", detail=f"a text-to-image row has {len(image)} images")
            image = image[0]
        return [self.drafter.vae_image(pictures(image), loss=True, droppable=False)]

    def resize_rules(self) -> dict[str, Any]:
        return self.drafter.resize_rules()

    @staticmethod
    def _caption(row: Mapping[str, Any], rng: random.Random) -> str:
        captions = row.get("captions")
        if captions is None:
            return pick_phrase(first_of(row, _CAPTION)[1], rng)
        if isinstance(captions, str):
            try:
                captions = json.loads(captions)
            except ValueError as error:
                raise RowError("invalid json", detail=f"captions: {error}") from error
        choices = list(captions.values()) if isinstance(captions, Mapping) else as_list(captions)
        return pick_phrase(choices, rng) if choices else " "
