"""What the model has read so far: keys and values written once, and contexts that share them.

All contexts of a batch of requests, guidance branches included, are lists of row ranges in one pool. Adding a text or
an image appends rows; a branch that starts with the same texts and images as another simply names the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from echo4o.data.positions import patchify_image, position_ids
from echo4o.model import Bagel
from echo4o.model.attention import Attention, FlashPlan, attend_ranges, find_varlen_attention, sdpa_varlen
from echo4o.packed import PackedBatch, Split

Range = tuple[int, int]


@dataclass(frozen=True)
class Context:
    """A sequence the model has read: where its keys lie in the pool, and the next rope position."""

    ranges: tuple[Range, ...] = ()
    rope: int = 0

    @property
    def kv_len(self) -> int:
        return sum(end - start for start, end in self.ranges)

    def followed_by(self, rows: Range, positions: int) -> Context:
        ranges = list(self.ranges)
        if ranges and ranges[-1][1] == rows[0]:
            ranges[-1] = (ranges[-1][0], rows[1])
        else:
            ranges.append(rows)
        return Context(tuple(ranges), self.rope + positions)


@dataclass(frozen=True)
class Text:
    """Token ids, begin and end markers included if they are to be read."""

    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_positions(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class VitImage:
    """(3, H, W) in [-1, 1] for the vision encoder."""

    image: Tensor
    num_tokens: int
    num_positions: int = 1


@dataclass(frozen=True)
class LatentImage:
    """Latent tokens (h · w, p·p·C) of an image at a time: 0 for a reference, the step's for the one being drawn."""

    tokens: Tensor
    grid: tuple[int, int]
    time: float = 0.0
    num_positions: int = 1

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + 2


Piece = Text | VitImage | LatentImage


@dataclass(frozen=True)
class Addition:
    """A piece read after a context, or after an earlier addition of the same call (its number).

    Attributes:
        at: first of its rows, in a block from `KVPool.allocate`; by default they are appended to the pool.
    """

    after: Context | int
    piece: Piece
    at: int | None = None


class KVPool:
    """Keys and values of every layer, (capacity, kv_heads, head_dim) each, filled from the front.

    A row takes 2 · layers · kv_heads · head_dim · bytes per number (BAGEL-7B in bfloat16: 57,344 bytes).
    """

    GROWTH = 1024  # rows at least, so that text of unknown length does not copy the pool at every token

    def __init__(self, model: Bagel, capacity: int = 0) -> None:
        llm = model.config.llm
        dtype, device = model.language_model.model.norm.weight.dtype, model.device
        if torch.is_autocast_enabled(device.type):  # a model that is being trained: its weights are float32
            dtype = torch.get_autocast_dtype(device.type)
        shape = (capacity, llm.num_key_value_heads, llm.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(llm.num_hidden_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in (*self.keys, *self.values))

    def reserve(self, num_rows: int) -> None:
        """Make room for so many more rows."""
        if self.length + num_rows <= self.capacity:
            return
        capacity = self.length + num_rows
        if self.length:
            capacity = max(capacity, self.capacity + self.GROWTH)
        for pool in (self.keys, self.values):
            for layer, old in enumerate(pool):
                pool[layer] = old.new_empty(capacity, *old.shape[1:])
                pool[layer][: self.length] = old[: self.length]

    def allocate(self, num_rows: int) -> int:
        """Set rows aside, to be written by later additions; returns the first one."""
        self.reserve(num_rows)
        self.length += num_rows
        return self.length - num_rows


class _PoolAttention:
    """Attention of the layers in turn: writes the new rows into the pool, then attends to ranges of it."""

    def __init__(self, pool: KVPool, layout: Pass) -> None:
        self.pool, self.layout, self.layer = pool, layout, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _uncompiled(self, q, k, v)


def _attend(to: _PoolAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pool, plan = to.pool, to.layout.plan
    keys, values = pool.keys[to.layer], pool.values[to.layer]
    to.layer += 1
    keys[to.layout.rows], values[to.layout.rows] = k, v
    q = q.to(keys.dtype)
    return attend_ranges(to.layout.splits, q, keys, values) if plan is None else plan(q, keys, values)


_uncompiled = cast(Callable[..., Tensor], torch.compiler.disable(_attend))


@dataclass(frozen=True)
class Pass:
    """A forward pass laid out: new rows, and the pool's rows each of them sees. Holds while the pool keeps its length.

    Attributes:
        after: contexts after each piece.
        rows: of the pool, where the new tokens' keys go; `num_appended` of them lie behind its end.
        plan: prepared attention on a GPU; None on a CPU.
        latents, times: latent tokens of all images in the pass, and each image's time.
    """

    pieces: tuple[Piece, ...]
    after: tuple[Context, ...]
    splits: tuple[Split, ...]
    rows: slice | Tensor
    num_appended: int
    batch: PackedBatch
    plan: Attention | None
    latents: Tensor | None
    times: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.batch.sequence_length


@dataclass(frozen=True)
class Markers:
    """Token ids that frame texts and images."""

    bos_token_id: int
    eos_token_id: int
    start_of_image: int
    end_of_image: int


class Reader:
    """Reads pieces into a pool and predicts from contexts; one forward pass for any number of them.

    Args:
        max_tokens: of a forward pass; more are read in several passes, so that working memory stays bounded.
    """

    def __init__(self, model: Bagel, markers: Markers, max_tokens: int = 16384) -> None:
        self.model, self.markers, self.max_tokens = model, markers, max_tokens
        self.pool = KVPool(model)

    def vit_image(self, image: Tensor) -> VitImage:
        patch = self.model.config.vit.patch_size if self.model.config.vit else 14
        return VitImage(image, (image.shape[1] // patch) * (image.shape[2] // patch) + 2)

    @torch.no_grad()
    def extend(self, additions: Sequence[Addition]) -> tuple[list[Context], list[Tensor]]:
        """Append pieces, whole chains of them if they name each other.

        Returns:
            The contexts after each addition, and the hidden states (num_tokens, hidden) of each piece.
        """
        contexts: list[Context] = []
        hidden: list[Tensor] = []
        self.pool.reserve(sum(addition.piece.num_tokens for addition in additions if addition.at is None))
        for chunk in self.chunks(additions):
            known = len(contexts)
            layout = self.plan([replace(a, after=_context(a.after, contexts, known)) for a in chunk])
            attend = _PoolAttention(self.pool, layout)
            states = self.model.hidden_states(layout.batch, layout.latents, layout.times, attend)
            self.pool.length += layout.num_appended
            contexts += layout.after
            hidden += states.split([piece.num_tokens for piece in layout.pieces])
        return contexts, hidden

    @torch.no_grad()
    def features(self, layout: Pass, latents: Tensor, times: Tensor) -> list[Tensor]:
        """The last layer's output (h · w, hidden) of every image being drawn; the pool keeps nothing of them.

        Args:
            latents: (n, p·p·C) latent tokens of all the pass's images.
            times: (images,) their times.
        """
        self.pool.reserve(layout.num_appended)
        features = self.model.latent_features(layout.batch, latents, times, _PoolAttention(self.pool, layout))
        return list(features.split([piece.num_tokens - 2 for piece in layout.pieces]))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) → (n, vocabulary) float32."""
        return self.model.language_model.lm_head(hidden).float()

    def chunks(self, additions: Sequence[Addition]) -> Iterator[list[Addition]]:
        """Additions in order, in groups of at most `max_tokens` tokens, at least one addition each."""
        chunk: list[Addition] = []
        for addition in additions:
            tokens = sum(a.piece.num_tokens for a in chunk) + addition.piece.num_tokens
            if chunk and tokens > self.max_tokens:
                yield chunk
                chunk = []
            chunk.append(addition)
        if chunk:
            yield chunk

    def plan(self, additions: Sequence[Addition]) -> Pass:
        """Lay out a forward pass."""
        before: list[Context] = []
        after: list[Context] = []
        splits, at, free = [], 0, self.pool.length
        own_rows: list[Range] = []
        for number, addition in enumerate(additions):
            before.append(after[addition.after] if isinstance(addition.after, int) else addition.after)
            end = at + addition.piece.num_tokens
            start = free if addition.at is None else addition.at
            own = (start, start + addition.piece.num_tokens)
            free = own[1] if addition.at is None else free
            own_rows.append(own)
            after.append(before[-1].followed_by(own, addition.piece.num_positions))
            mode = "causal" if isinstance(addition.piece, Text) else "full"
            splits.append(Split(at, end, mode, number, after[-1].ranges))
            at = end
        pieces = tuple(addition.piece for addition in additions)
        batch, latents, times = self._pack(pieces, [context.rope for context in before])
        plan = None
        if (device := self.model.device).type != "cpu":
            plan = FlashPlan(splits, device, find_varlen_attention() or sdpa_varlen)
        rows = self._rows(own_rows)
        num_appended = free - self.pool.length
        return Pass(pieces, tuple(after), tuple(splits), rows, num_appended, batch, plan, latents, times)

    def _rows(self, ranges: Sequence[Range]) -> slice | Tensor:
        """A slice where the ranges follow each other, else an index."""
        if all(one[1] == other[0] for one, other in pairwise(ranges)):
            return slice(ranges[0][0], ranges[-1][1])
        return torch.cat([torch.arange(*rows) for rows in ranges]).to(self.model.device)

    def _pack(self, pieces: Sequence[Piece], ropes: Sequence[int]) -> tuple[PackedBatch, Tensor | None, Tensor | None]:
        """The new tokens as a packed batch, latent tokens, and the time of each latent image."""
        config, markers = self.model.config, self.markers
        text_ids, text_at, positions, lengths = [], [], [], []
        vit_tokens, vit_at, vit_ids, latents, vae_at, vae_ids, grids, times = [], [], [], [], [], [], [], []
        at = 0
        for piece, rope in zip(pieces, ropes, strict=True):
            end = at + piece.num_tokens
            lengths.append(piece.num_tokens)
            if isinstance(piece, Text):
                text_ids += piece.ids
                text_at += range(at, end)
                positions += range(rope, rope + piece.num_tokens)
            else:
                text_ids += [markers.start_of_image, markers.end_of_image]
                text_at += [at, end - 1]
                positions += [rope] * piece.num_tokens
                inside = torch.arange(at + 1, end - 1)
                if isinstance(piece, VitImage):
                    patch = config.vit.patch_size if config.vit else 14
                    _, height, width = piece.image.shape
                    side = config.vit_max_num_patch_per_side
                    vit_tokens.append(patchify_image(piece.image, patch))
                    vit_ids.append(position_ids(height, width, patch, side, config.interpolate_pos))
                    vit_at.append(inside)
                else:
                    h, w = piece.grid
                    pixels = config.latent_downsample
                    side = config.max_latent_size
                    vae_ids.append(position_ids(h * pixels, w * pixels, pixels, side, config.interpolate_pos))
                    latents.append(piece.tokens)
                    vae_at.append(inside)
                    grids.append(piece.grid)
                    times.append(piece.time)
            at = end
        device = self.model.device
        batch = PackedBatch(
            sequence_length=at,
            sample_lens=lengths,
            split_lens=lengths,
            attn_modes=["full"] * len(lengths),
            packed_text_ids=torch.tensor(text_ids),
            packed_text_indexes=torch.tensor(text_at),
            packed_position_ids=torch.tensor(positions),
            packed_vit_tokens=torch.cat(vit_tokens) if vit_tokens else None,
            packed_vit_token_indexes=torch.cat(vit_at) if vit_at else None,
            packed_vit_position_ids=torch.cat(vit_ids) if vit_ids else None,
            vit_token_seqlens=[len(tokens) for tokens in vit_tokens] or None,
            patchified_vae_latent_shapes=grids or None,
            packed_latent_position_ids=torch.cat(vae_ids) if vae_ids else None,
            packed_vae_token_indexes=torch.cat(vae_at) if vae_at else None,
        ).to(device)
        if not latents:
            return batch, None, None
        return batch, torch.cat(latents).to(device), torch.tensor(times, device=device)


def _context(after: Context | int, contexts: Sequence[Context], known: int) -> Context | int:
    """Numbers of additions of earlier passes become their contexts, those of this pass start from 0."""
    if not isinstance(after, int):
        return after
    return contexts[after] if after < known else after - known
