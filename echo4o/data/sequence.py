"""One packed sequence under construction: where every token, position, label and split of a segment goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from echo4o.data.positions import patchify_image
from echo4o.data.sample import Sample, Segment
from echo4o.packed import PackedBatch

if TYPE_CHECKING:
    from echo4o.data.packing import Packer

CLEAN = float("-inf")  # time step of a clean image: sigmoid(-inf) = 0


def len2weight(num_tokens: int, reduction: str = "square") -> float:
    """Cross-entropy weight of each token of a text of `num_tokens` tokens (upstream's rule)."""
    if reduction not in ("token", "sample", "square"):
        raise ValueError(f"ce_loss_reduction is {reduction!r}; known: token, sample, square")
    if num_tokens == 0:
        return 0.0
    return {"token": 1.0, "sample": 1 / num_tokens, "square": 1 / math.sqrt(num_tokens)}[reduction]


def is_noised(segment: Segment) -> bool:
    """The segment is an image to be generated: it carries a time step and a flow-matching loss."""
    return segment.kind == "vae_image" and segment.loss


@dataclass(frozen=True)
class Decisions:
    """The random decisions about one sample, one entry a segment."""

    dropped: tuple[bool, ...]
    timesteps: tuple[float, ...]  # standard normal; used by the segment that opens a noised split
    noise_seeds: tuple[int, ...]  # of a VAE image's posterior sample and flow noise


class PackedSequence:
    """Segments laid down one after the other as index arrays, which `batch` concatenates once at the end."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.config = packer.config
        self.length = 0
        self.rope = 0
        self.split_length = 0
        self.split_timestep = CLEAN
        self.samples: list[Sample] = []
        self.sample_lens: list[int] = []
        self.split_lens: list[int] = []
        self.attn_modes: list[str] = []
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.vit_tokens: list[Tensor] = []
        self.vit_features: list[Tensor] = []
        self.vit_is_encoded: list[bool] = []
        self.latent_shapes: list[tuple[int, int]] = []
        self.images: dict[int, tuple[int, Tensor]] = {}
        self.moments: dict[int, tuple[int, Tensor]] = {}
        self.image_indexes: list[tuple[bool, int]] = []  # whether among moments, and the place there
        self.noise_seeds: list[int] = []

    def add_sample(self, sample: Sample, decisions: Decisions) -> None:
        start, self.rope, self.split_length = self.length, 0, 0
        segments = zip(sample.segments, decisions.dropped, decisions.timesteps, decisions.noise_seeds, strict=True)
        for segment, dropped, timestep, noise_seed in segments:
            if segment.split_start:
                self._close_split()
            if dropped:
                self.rope += segment.kind != "text"
            elif segment.kind == "text":
                self._add_text(segment)
            else:
                self._add_image(segment, timestep, noise_seed)
            if segment.split_end:
                self._close_split()
        self._close_split()
        self.samples.append(sample)
        self.sample_lens.append(self.length - start)

    def _add_text(self, segment: Segment) -> None:
        config, ids = self.config, segment.text_ids
        count = len(ids) + 1
        self._close_split()
        self._open_split("causal")
        span = np.arange(self.length, self.length + count + 1)
        self._append("text_ids", np.array([config.bos_token_id, *ids, config.eos_token_id], dtype=np.int64))
        self._append("text_indexes", span)
        self._append("rope", np.arange(self.rope, self.rope + count + 1))
        if segment.loss:
            labels = np.array([*ids, config.eos_token_id], dtype=np.int64)
            self._add_labels(span[:count], labels, len2weight(count, config.ce_loss_reduction))
        self._add_marker_label(segment, span[-1:])
        self.rope += count + 1
        self._advance(count + 1)
        self._close_split()

    def _add_image(self, segment: Segment, timestep: float, noise_seed: int) -> None:
        noised = is_noised(segment)
        self._open_split("noise" if noised and segment.frame_delta is None else "full", timestep)
        grid_ids = self.packer.grid_ids(segment.kind, *segment.pixels)
        count = len(grid_ids)
        tokens = np.arange(self.length + 1, self.length + 1 + count)
        ends = np.array([self.length, self.length + 1 + count])
        self._append("text_ids", np.array([self.config.start_of_image, self.config.end_of_image]))
        self._append("text_indexes", ends)
        self._append("rope", np.full(count + 2, self.rope))
        if segment.kind == "vit_image":
            self._append("vit_indexes", tokens)
            self._append("vit_position_ids", grid_ids)
            self._append("vit_seqlens", np.array([count]))
            self._add_vit_image(segment)
        else:
            self._append("vae_indexes", tokens)
            self._append("latent_position_ids", grid_ids)
            self._append("timesteps", np.full(count, self.split_timestep if noised else CLEAN, dtype=np.float32))
            if noised:
                self._append("mse_indexes", tokens)
            self._add_vae_image(segment, noise_seed)
        self._add_marker_label(segment, ends[1:])
        self.rope += segment.frame_delta if segment.frame_delta is not None else int(not noised)
        self._advance(count + 2)

    def _add_vit_image(self, segment: Segment) -> None:
        self.vit_is_encoded.append(segment.encoded is not None)
        if segment.encoded is not None:
            self.vit_features.append(segment.encoded)
            return
        assert segment.image is not None
        # Patches end in the channel axis: from a channels-last image they are copied twice as fast.
        channels_last = segment.image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        self.vit_tokens.append(patchify_image(channels_last, self.config.vit_patch_size))

    def _add_vae_image(self, segment: Segment, noise_seed: int) -> None:
        downsample, (height, width) = self.config.latent_downsample, segment.pixels
        self.latent_shapes.append((height // downsample, width // downsample))
        is_encoded = segment.encoded is not None
        kept, given = (self.moments, segment.encoded) if is_encoded else (self.images, segment.image)
        assert given is not None
        place, _ = kept.setdefault(id(given), (len(kept), given))
        self.image_indexes.append((is_encoded, place))
        self.noise_seeds.append(noise_seed)

    def _add_marker_label(self, segment: Segment, index: np.ndarray) -> None:
        if segment.special_token_loss:
            if segment.special_token_label is None:
                raise ValueError("a segment with special_token_loss needs a special_token_label")
            self._add_labels(index, np.array([segment.special_token_label]), 1.0)

    def _add_labels(self, indexes: np.ndarray, labels: np.ndarray, weight: float) -> None:
        self._append("ce_indexes", indexes)
        self._append("labels", labels)
        self._append("ce_weights", np.full(len(labels), weight, dtype=np.float32))

    def _open_split(self, mode: str, timestep: float = CLEAN) -> None:
        if not self.split_length:
            self.attn_modes.append(mode)
            self.split_timestep = timestep

    def _close_split(self) -> None:
        if self.split_length:
            self.split_lens.append(self.split_length)
            self.split_length = 0

    def _advance(self, count: int) -> None:
        self.length += count
        self.split_length += count

    def _append(self, name: str, array: np.ndarray) -> None:
        self.arrays.setdefault(name, []).append(array)

    def _joined(self, name: str) -> Tensor:
        return torch.from_numpy(np.concatenate(self.arrays[name]))

    def _tensor(self, name: str) -> Tensor | None:
        return self._joined(name) if name in self.arrays else None

    def batch(self) -> PackedBatch:
        """The finished pack; it must hold at least one segment."""
        addresses = [sample.address for sample in self.samples if sample.address is not None]
        places = [place + len(self.images) * is_encoded for is_encoded, place in self.image_indexes]
        return PackedBatch(
            sequence_length=self.length,
            sample_lens=self.sample_lens,
            split_lens=self.split_lens,
            attn_modes=self.attn_modes,
            packed_text_ids=self._joined("text_ids"),
            packed_text_indexes=self._joined("text_indexes"),
            packed_position_ids=self._joined("rope"),
            packed_vit_tokens=torch.cat(self.vit_tokens) if self.vit_tokens else None,
            packed_vit_token_indexes=self._tensor("vit_indexes"),
            packed_vit_position_ids=self._tensor("vit_position_ids"),
            vit_token_seqlens=self._tensor("vit_seqlens"),
            patchified_vae_latent_shapes=self.latent_shapes or None,
            packed_latent_position_ids=self._tensor("latent_position_ids"),
            packed_vae_token_indexes=self._tensor("vae_indexes"),
            packed_timesteps=self._tensor("timesteps"),
            mse_loss_indexes=self._tensor("mse_indexes"),
            packed_label_ids=self._tensor("labels"),
            ce_loss_indexes=self._tensor("ce_indexes"),
            ce_loss_weights=self._tensor("ce_weights"),
            vae_images=[image for _, image in self.images.values()] or None,
            vae_moments=[moments for _, moments in self.moments.values()] or None,
            vae_image_indexes=places or None,
            vae_seeds=self.noise_seeds or None,
            vit_features=torch.cat(self.vit_features) if self.vit_features else None,
            vit_is_encoded=self.vit_is_encoded if self.vit_features else None,
            sample_names=[sample.name for sample in self.samples],
            sample_rows=[sample.row for sample in self.samples],
            sample_addresses=addresses if len(addresses) == len(self.samples) else [],
        )
