"""A picture of how one sample is packed: its images above the tokens they become, rope positions below, and the
attention layout as rectangles (`AttentionLayout.splits`) on the tokens' own axis.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon, Rectangle

from echo4o.data.sample import Sample, Segment
from echo4o.packed import PackedBatch, Split

COLOURS = {"text": "#E8A33D", "vae": "#3A78C9", "vit": "#2A9D8F", "noise": "#D1495B"}
MEANINGS = {
    "text": "text: causal",
    "vae": "clean VAE latents of a reference",
    "vit": "ViT patches of a reference",
    "noise": "target, noised: what is learned",
}
INK, FAINT = "#22272E", "#8A929C"


@dataclass(frozen=True)
class Part:
    """A split of the pack together with the segments that were laid down in it."""

    split: Split
    kind: str  # text | vae | vit | noise
    segments: tuple[Segment, ...]

    @property
    def centre(self) -> float:
        return (self.split.start + self.split.end) / 2


def draw_sample(sample: Sample, batch: PackedBatch, out: str | Path, *, texts: Sequence[str] = ()) -> None:
    """Draw a pack that holds one sample, nothing dropped.

    Args:
        texts: the sample's texts, for the heading.
        out: picture to write; the suffix decides the format.
    """
    parts = match_splits(sample, batch)
    figure = Figure(figsize=(13, 9.4), facecolor="white")
    left, width = 0.088, 0.645
    pictures = figure.add_axes((left, 0.755, width, 0.145))
    strip = figure.add_axes((left, 0.685, width, 0.045))
    attention = figure.add_axes((left, 0.03, width, 0.595))
    legend = figure.add_axes((left + width + 0.022, 0.035, 0.235, 0.865))

    _draw_heading(figure, batch, parts, texts, left)
    _draw_pictures(pictures, parts, batch.sequence_length, _inches(figure, pictures))
    _draw_strip(strip, parts, batch, _inches(figure, strip)[0])
    draw_attention(attention, parts, batch)
    _label_attention(attention, parts, batch.sequence_length)
    _draw_legend(legend, parts, batch)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def match_splits(sample: Sample, batch: PackedBatch) -> list[Part]:
    """Each split of the pack with its segments.

    Raises:
        ValueError: if the pack holds other splits than the sample: segments were dropped, or it has more samples.
    """
    units: list[list[Segment]] = []
    for segment in sample.segments:
        if segment.split_start or not units:
            units.append([])
        units[-1].append(segment)
    splits = batch.layout.splits
    if len(splits) != len(units):
        raise ValueError(f"the pack has {len(splits)} splits, the sample {len(units)}: draw one sample without dropout")
    return [Part(split, _kind(split, unit[0]), tuple(unit)) for split, unit in zip(splits, units, strict=True)]


def _kind(split: Split, segment: Segment) -> str:
    if segment.kind == "text":
        return "text"
    if split.mode == "noise":
        return "noise"
    return "vae" if segment.kind == "vae_image" else "vit"


# ---------------------------------------------------------------- drawing


def _draw_heading(figure: Figure, batch: PackedBatch, parts: list[Part], texts: Sequence[str], left: float) -> None:
    num_references = len(_reference_runs(parts))
    title = f"One sample, {num_references} reference{'s' * (num_references != 1)}, {batch.sequence_length} tokens"
    figure.text(left, 0.955, title, fontsize=19, fontweight="bold", color=INK)
    text = textwrap.shorten(" / ".join(texts), 110)
    figure.text(left, 0.925, f"“{text}”" if text else "", fontsize=12.5, color=INK, style="italic")


def _draw_pictures(axes: Axes, parts: list[Part], num_tokens: int, inches: tuple[float, float]) -> None:
    """Thumbnails above their splits: one for the VAE and ViT tokens of the same reference, one a target."""
    _bare(axes, num_tokens)
    inches_wide, inches_high = inches
    runs = [(f"reference {number}", run) for number, run in enumerate(_reference_runs(parts), start=1)]
    runs += [("target", [part]) for part in parts if part.kind == "noise"]
    widest = inches_wide / max(len(runs), 1) * 0.9
    for label, run in runs:
        image = run[0].segments[0].image
        start, end = run[0].split.start, run[-1].split.end
        assert image is not None  # every kind but text has one
        pixels = ((image.permute(1, 2, 0).clamp(-1, 1) + 1) / 2).numpy()
        if label == "target":
            pixels = _noised(pixels)
        height = min(0.74, widest / inches_high * pixels.shape[0] / pixels.shape[1])
        width = height * inches_high * pixels.shape[1] / pixels.shape[0] / inches_wide * num_tokens
        middle = min(max((start + end) / 2, width / 2), num_tokens - width / 2)
        bottom = 0.1
        axes.imshow(
            pixels, extent=(middle - width / 2, middle + width / 2, bottom, bottom + height), aspect="auto", zorder=2
        )
        frame = (middle - width / 2, bottom), width, height
        axes.add_patch(Rectangle(*frame, fill=False, edgecolor=INK, linewidth=0.8, zorder=3))
        axes.text(middle, bottom + height + 0.04, label, ha="center", va="bottom", fontsize=11, color=INK)
        _bracket(axes, start, end)
    for part in parts:
        if part.kind == "text":
            _bracket(axes, part.split.start, part.split.end)
            label = "learned text" if part.segments[0].loss else "instruction"
            if part.split.length > 0.07 * num_tokens:
                axes.text(part.centre, 0.1, label, ha="center", va="bottom", fontsize=11, color=INK)
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(0, 1)


def _bracket(axes: Axes, start: int, end: int) -> None:
    axes.plot([start, start, end, end], [-0.06, 0.0, 0.0, -0.06], color=INK, linewidth=0.9, clip_on=False)


def _draw_strip(axes: Axes, parts: list[Part], batch: PackedBatch, inches_wide: float) -> None:
    """Every token by kind; marker tokens darker; rope positions below."""
    _bare(axes, batch.sequence_length)
    markers = set(batch.packed_text_indexes.tolist())
    for part in parts:
        split, colour = part.split, COLOURS[part.kind]
        axes.add_patch(Rectangle((split.start, 0), split.length, 1, color=colour, linewidth=0))
        for token in (split.start, split.end - 1):
            if token in markers:
                axes.add_patch(Rectangle((token, 0), 1, 1, facecolor=INK, alpha=0.55, linewidth=0))
        first, last = (int(batch.packed_position_ids[at]) for at in (split.start, split.end - 1))
        positions = f"{first}" if first == last else f"{first}–{last}"
        axes.text(part.centre, -0.22, positions, ha="center", va="top", fontsize=9.5, color=INK)
    cell_inches = inches_wide / batch.sequence_length
    if cell_inches > 0.02:  # closer lines would hide the colours
        axes.vlines(range(1, batch.sequence_length), 0, 1, color="white", linewidth=0.35)
    axes.vlines([part.split.start for part in parts[1:]], 0, 1, color="white", linewidth=2)
    axes.text(-0.012, 0.5, "tokens", transform=axes.transAxes, ha="right", va="center", fontsize=10.5, color=INK)
    axes.text(-0.012, -0.22, "position", transform=axes.transAxes, ha="right", va="top", fontsize=10.5, color=INK)


def draw_attention(axes: Axes, parts: list[Part], batch: PackedBatch) -> None:
    """Rows are queries, columns keys; one rectangle for each range of keys of a split, a triangle for causal text."""
    length = batch.sequence_length
    _bare(axes, length)
    axes.add_patch(Rectangle((0, 0), length, length, color="#F4F5F7", linewidth=0))
    for part in parts:
        split, colour = part.split, COLOURS[part.kind]
        for start, end in split.key_ranges:
            before = min(end, split.start) - start
            if before > 0:
                style = {"facecolor": colour, "alpha": 0.5, "linewidth": 0}
                axes.add_patch(Rectangle((start, split.start), before, split.length, **style))
        corners = [(split.start, split.start), (split.start, split.end), (split.end, split.end)]
        if split.mode != "causal":
            corners.append((split.end, split.start))
        axes.add_patch(Polygon(corners, facecolor=colour, linewidth=0))
    for part in parts:
        axes.axvline(part.split.start, color="white", linewidth=1.1)
        axes.axhline(part.split.start, color="white", linewidth=1.1)
    axes.set_ylim(length, 0)


def _label_attention(axes: Axes, parts: list[Part], length: int) -> None:
    for label, first, last in _row_labels(parts):
        axes.text(-0.012 * length, (first + last) / 2, label, ha="right", va="center", fontsize=10.5, color=INK)
    blank = _largest_blank(parts)
    if blank is not None:
        column, top, bottom = blank
        axes.text(
            (column.start + column.end) / 2, (top + bottom) / 2, "nobody attends\nto a noised target",
            ha="center", va="center", rotation=90, fontsize=10.5, color=COLOURS["noise"],
        )  # fmt: skip
    axes.text(1, 1.01, "keys →", transform=axes.transAxes, ha="right", va="bottom", fontsize=10, color=FAINT)


def _draw_legend(axes: Axes, parts: list[Part], batch: PackedBatch) -> None:
    axes.set_axis_off()
    present = [kind for kind in COLOURS if any(part.kind == kind for part in parts)]
    handles = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in present]
    handles.append(Patch(color=INK, alpha=0.55, label="markers: begin and end"))
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.03, 1.0), frameon=False, fontsize=11, labelspacing=0.7,
        borderaxespad=0,
    )  # fmt: skip
    pairs, square = batch.layout.num_allowed_pairs, batch.sequence_length**2
    twice = any(len(run) > 1 for run in _reference_runs(parts))
    lines = [
        ("Tokens", "Each reference stands twice: as VAE latents (how it looks) and as ViT patches (what it shows).")
        if twice
        else ("Tokens", "Each image is framed by two markers, each text by begin and end."),
        ("Position", "An image shares one rope position; text advances by one a token."),
        ("Attention", "Rows are queries, columns the keys they may see. Solid: inside a split. Pale: earlier splits."),
        ("Cost", f"{pairs:,} of {square:,} pairs are allowed ({pairs / square:.0%}); the mask is never built."),
    ]
    height = 0.66
    for head, body in lines:
        wrapped = textwrap.fill(body, 34)
        axes.text(0, height, head, fontsize=12, fontweight="bold", color=INK, va="top")
        axes.text(0, height - 0.033, wrapped, fontsize=11, color=INK, va="top", linespacing=1.35)
        height -= 0.033 + 0.0315 * (wrapped.count("\n") + 1) + 0.035
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _reference_runs(parts: list[Part]) -> list[list[Part]]:
    """Condition images; the VAE and the ViT tokens of one image follow each other and make one run."""
    runs: list[list[Part]] = []
    previous = ""
    for part in parts:
        if part.kind in ("vae", "vit"):
            if part.kind == "vit" and previous == "vae":
                runs[-1].append(part)
            else:
                runs.append([part])
        previous = part.kind
    return runs


def _row_labels(parts: list[Part]) -> list[tuple[str, int, int]]:
    labels = [
        (f"reference {number}", run[0].split.start, run[-1].split.end)
        for number, run in enumerate(_reference_runs(parts), start=1)
    ]
    labels += [
        ({"text": "text", "noise": "target"}[part.kind], part.split.start, part.split.end)
        for part in parts
        if part.kind in ("text", "noise")
    ]
    # Labels of rows that are too thin to be read apart are left out.
    total = parts[-1].split.end
    return [label for label in labels if label[2] - label[1] > 0.03 * total]


def _largest_blank(parts: list[Part]) -> tuple[Split, int, int] | None:
    """The noised split whose column has the most room for a note, with the rows that do not see it."""
    rooms = [(part.split, 0, part.split.start) for part in parts if part.kind == "noise"]
    rooms = [(split, top, bottom) for split, top, bottom in rooms if bottom - top > 0.3 * parts[-1].split.end]
    return max(rooms, key=lambda room: room[0].length, default=None)


def _noised(pixels: np.ndarray) -> np.ndarray:
    """The image on the left, turning into noise towards the right."""
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).numpy()
    share = np.clip(np.linspace(-0.35, 1.05, pixels.shape[1]), 0, 0.9)[None, :, None]
    return pixels * (1 - share) + noise * share


def _inches(figure: Figure, axes: Axes) -> tuple[float, float]:
    """Width and height of `axes` on paper."""
    box = axes.get_position()
    return box.width * figure.get_figwidth(), box.height * figure.get_figheight()


def _bare(axes: Axes, num_tokens: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(0, 1)
