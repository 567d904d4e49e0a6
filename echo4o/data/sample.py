"""A training example as an ordered plan of segments: the currency between sources and the packer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

SEGMENT_KINDS = ("text", "vae_image", "vit_image")


@dataclass(frozen=True)
class Segment:
    """One element of a sample. Upstream's plan keys, with its defaults.

    Attributes:
        kind: ``text``, ``vae_image`` (latent tokens) or ``vit_image`` (understanding tokens).
        text_ids: token ids without bos and eos, for text.
        image: (3, H, W) in [-1, 1], already resized to its stride, for images.
        encoded: what a cache holds of the image, in place of `image` (`echo4o.data.latent_cache`).
        size: (width, height) of the image where it is given as `encoded`.
        loss: the segment is learned: next-token loss on text, flow-matching loss on a VAE image.
        droppable: may be dropped for classifier-free guidance (upstream's ``enable_cfg``).
        special_token_loss: the closing marker also predicts ``special_token_label``.
        split_start / split_end: several segments (video frames) may share one attention split.
        frame_delta: rope positions to advance after a video frame.
    """

    kind: str
    text_ids: tuple[int, ...] = ()
    image: Tensor | None = None
    loss: bool = False
    droppable: bool = False
    special_token_loss: bool = False
    special_token_label: int | None = None
    split_start: bool = True
    split_end: bool = True
    frame_delta: int | None = None
    encoded: Tensor | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in SEGMENT_KINDS:
            raise ValueError(f"unknown segment type {self.kind!r}; known: {', '.join(SEGMENT_KINDS)}")
        given = self.image is not None or (self.encoded is not None and self.size is not None)
        if given == (self.kind == "text"):
            raise ValueError(f"a {self.kind} segment {'takes no' if given else 'needs an'} image")

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the image of an image segment."""
        if self.image is not None:
            return self.image.shape[1], self.image.shape[2]
        assert self.size is not None  # see __post_init__
        return self.size[1], self.size[0]


@dataclass(frozen=True)
class ConditionDropout:
    """Dropout probabilities that go before those of the run (`PackingConfig`); ``None`` leaves the run's."""

    text_cond_dropout_prob: float | None = None
    vae_cond_dropout_prob: float | None = None
    vit_cond_dropout_prob: float | None = None
    all_refs_dropout_prob: float | None = None


@dataclass(frozen=True)
class Sample:
    """One training example, ready to be packed.

    Attributes:
        segments: in sequence order.
        seed: every random decision about this example (dropout, time step, noise) is drawn from it; ``None`` lets
            the packer draw one from its generator.
        name: name of the data set it came from.
        row: where it lies on disk, for messages (``file:row``).
        address: (source, epoch, index) of the row, for tracing.
        dropout: probabilities of its own.
    """

    segments: tuple[Segment, ...]
    seed: int | None = None
    name: str = ""
    row: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)
    address: tuple[str, int, int] | None = None
    dropout: ConditionDropout | None = None

    @classmethod
    def from_plan(
        cls,
        sequence_plan: Sequence[Mapping],
        text_ids_list: Sequence[Sequence[int]],
        images: Sequence[Tensor],
        **attributes,
    ) -> Sample:
        """Build from upstream's plan dictionaries.

        Args:
            sequence_plan: one dictionary a segment with ``type`` and optionally ``loss, enable_cfg,
                special_token_loss, special_token_label, split_start, split_end, frame_delta``.
            text_ids_list: ids (without bos/eos) of the text segments, in order.
            images: (3, H, W) tensors of the image segments (VAE and ViT alike), in order.

        Raises:
            ValueError: if the plan and the lists do not have the same number of texts and images.
        """
        num_texts = sum(item["type"] == "text" for item in sequence_plan)
        if num_texts != len(text_ids_list) or len(sequence_plan) - num_texts != len(images):
            raise ValueError(
                f"the plan has {num_texts} texts and {len(sequence_plan) - num_texts} images, "
                f"but {len(text_ids_list)} texts and {len(images)} images were given"
            )
        texts, pictures = iter(text_ids_list), iter(images)
        segments = []
        for item in sequence_plan:
            is_text = item["type"] == "text"
            segments.append(
                Segment(
                    kind=item["type"],
                    text_ids=tuple(int(i) for i in next(texts)) if is_text else (),
                    image=None if is_text else next(pictures),
                    loss=bool(item.get("loss", 0)),
                    droppable=bool(item.get("enable_cfg", 0)),
                    special_token_loss=bool(item.get("special_token_loss", 0)),
                    special_token_label=item.get("special_token_label"),
                    split_start=item.get("split_start", True),
                    split_end=item.get("split_end", True),
                    frame_delta=item.get("frame_delta"),
                )
            )
        return cls(tuple(segments), **attributes)
