"""Understanding rows (LLaVA-style JSONL): ``conversations`` about ``image`` or ``video``; answers carry the loss."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from echo4o.data.errors import RowError
from echo4o.data.sources.columns import as_list, first_of
from echo4o.data.sources.drafts import Drafter, Picture, PictureReader, SegmentDraft
from echo4o.data.sources.video import FrameSampler, video_frames

_HUMAN = ("human", "user")
_GPT = ("gpt", "assistant")
_IMAGE_TAG = "<image>"
_VIDEO_TAG = "<video>"


@dataclass(frozen=True)
class VlmPlanner:
    """Questions cut at ``<image>``, images (ViT only, never dropped), answers (next-token loss), in the order spoken.

    Every image gets the transform's max_pixels divided by the number of images. Placeholders beyond the images are
    ignored, and so are images beyond the placeholders, as upstream.
    """

    drafter: Drafter
    sampler: FrameSampler
    columns: ClassVar[tuple[str, ...]] = ("conversations", "image", "images", "video")
    images_vary: ClassVar[bool] = False

    def draft(self, row: Mapping[str, Any], pictures: PictureReader, rng: random.Random) -> list[SegmentDraft]:
        turns = _turns(row)
        images: Sequence[Picture]
        if row.get("video") is not None:
            images = self._frames(row["video"], pictures, rng)
            turns[0] = (turns[0][0], _with_frames(turns[0][1], len(images)))
        else:
            _, values = first_of(row, ("image", "images"))
            images = [] if values is None else [pictures(value) for value in as_list(values)]

        remaining = iter(images)
        drafts: list[SegmentDraft] = []
        for part, loss in _parts(turns, len(images)):
            if part is None:
                drafts.append(self.drafter.vit_image(next(remaining), droppable=False, img_num=len(images)))
                continue
            text = self.drafter.text(part, loss=loss)
            if text.text_ids:
                drafts.append(text)
        if not any(draft.loss for draft in drafts):
            raise RowError("no loss", detail="the conversation has no answer to learn from")
        return drafts

    def images(self, row: Mapping[str, Any], pictures: PictureReader) -> list[SegmentDraft]:
        if row.get("video") is not None:
            return []  # which frames are used is drawn anew every epoch
        return [draft for draft in self.draft(row, pictures, random.Random(0)) if draft.picture is not None]

    def resize_rules(self) -> dict[str, Any]:
        return self.drafter.resize_rules()

    def _frames(self, video: Any, pictures: PictureReader, rng: random.Random) -> Sequence[Picture]:
        if not isinstance(video, str):
            raise RowError("wrong column type", detail=f"video is {type(video).__name__}, not a path")
        return video_frames(pictures.path(video), self.sampler, pictures, rng)


def _turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(speaker, text) of every turn."""
    conversations = row.get("conversations")
    if not conversations:
        raise RowError("conversation missing")
    if not isinstance(conversations, list):
        raise RowError("wrong column type", detail=f"conversations is {type(conversations).__name__}, not a list")
    turns = []
    for turn in conversations:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise RowError("wrong column type", detail=f"a turn needs from and value: {str(turn)[:80]}")
        turns.append((speaker, text))
    return turns


def _with_frames(text: str, num_frames: int) -> str:
    if _VIDEO_TAG not in text:
        raise RowError("placeholder without image", detail=f"the first turn of a video row needs {_VIDEO_TAG}")
    return text.replace(_VIDEO_TAG, _IMAGE_TAG * num_frames)


def _parts(turns: Sequence[tuple[str, str]], num_images: int) -> Iterator[tuple[str | None, bool]]:
    """(text, loss) pieces in order; ``None`` instead of a text stands for the next image."""
    num_placed = 0
    for speaker, text in turns:
        if speaker in _GPT:
            yield text, True
        elif speaker in _HUMAN and _IMAGE_TAG not in text:
            yield text, False
        elif speaker in _HUMAN:
            pieces = text.split(_IMAGE_TAG)
            for place, piece in enumerate(pieces):
                if piece.strip():
                    yield piece.strip(), False
                if place < len(pieces) - 1 and num_placed < num_images:
                    num_placed += 1
                    yield None, False
