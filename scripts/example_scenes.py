"""The example task: pictures of a shape, a texture and a background, and instructions that combine them.

Imported by ``scripts/make_example_data.py`` and ``scripts/train_tiny_vae.py``; runs nothing itself. Everything is drawn
with integer arithmetic from numpy, so that the same scene has the same pixels on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (220, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 40),
    "green": (40, 160, 75),
    "blue": (45, 85, 220),
    "purple": (145, 65, 185),
}
PALE_COLOURS = {
    "light blue": (185, 215, 245),
    "light green": (195, 235, 190),
    "pink": (250, 205, 220),
    "sand": (240, 225, 180),
    "grey": (200, 200, 200),
}
WHITE = (255, 255, 255)
CHARCOAL = (60, 60, 70)
DATA_SEED = 0
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
TEXTURES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots")
BACKGROUNDS = ("plain", "horizon", "gradient")
SIZES = ((64, 64), (64, 64), (80, 64), (64, 80), (96, 64), (64, 96), (80, 80))  # squares twice as often
SCALES = (5, 7)  # the shape's diameter in tenths of the picture's shorter side
CELL = 8  # textures and frames are aligned to it; one latent pixel of the autoencoder
FRAME = 8
SUBPIXELS = 4
TASKS = ("recolour", "on_colour", "on_background", "borrow_colour", "borrow_texture", "compose", "compose_framed")
TASKS += ("compose", "compose_framed")  # three and four references twice as often


@dataclass(frozen=True)
class Paint:
    """A colour, texture or background that fills any picture. ``colours`` are one or two RGB triples."""

    kind: str
    colours: tuple[tuple[int, int, int], ...]

    def pixels(self, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        first, last = np.array(self.colours[0]), np.array(self.colours[-1])
        y, x = np.mgrid[:height, :width]
        if self.kind == "gradient":
            share = y[..., None]
            return ((first * (height - 1 - share) + last * share) // (height - 1)).astype(np.uint8)
        return np.where(self._is_first(x, y, height)[..., None], first, last).astype(np.uint8)

    def _is_first(self, x: np.ndarray, y: np.ndarray, height: int) -> np.ndarray:
        match self.kind:
            case "plain":
                return np.ones_like(x, dtype=bool)
            case "horizon":
                return y < height * 5 // 8 // CELL * CELL
            case "horizontal stripes":
                return y // CELL % 2 == 0
            case "vertical stripes":
                return x // CELL % 2 == 0
            case "diagonal stripes":
                return (x + y) // CELL % 2 == 0
            case "checks":
                return (x // CELL + y // CELL) % 2 == 0
            case "dots":
                return (2 * (x % 16) - 15) ** 2 + (2 * (y % 16) - 15) ** 2 <= 11**2
        raise ValueError(f"unknown paint {self.kind!r}")


@dataclass(frozen=True)
class Scene:
    """A background and, optionally, one centred shape and a frame."""

    background: Paint
    shape: str | None = None
    fill: Paint | None = None
    scale: int = SCALES[0]
    frame: Paint | None = None

    def render(self, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        picture = self.background.pixels(width, height).astype(np.int64)
        if self.shape is not None:
            coverage = shape_coverage(self.shape, self.scale, width, height)[..., None]
            filling, full = self.fill.pixels(width, height), SUBPIXELS**2
            picture = (picture * (full - coverage) + filling * coverage + full // 2) // full
        if self.frame is not None:
            border = np.ones((height, width, 1), dtype=bool)
            border[FRAME:-FRAME, FRAME:-FRAME] = False
            picture = np.where(border, self.frame.pixels(width, height), picture)
        return picture.astype(np.uint8)


def shape_coverage(shape: str, scale: int, width: int, height: int) -> np.ndarray:
    """Subpixels (of 16) of each pixel that lie in a centred shape: (height, width) integers."""
    # Odd coordinates, twice as fine as the subpixels, are symmetric about the centre without fractions.
    u = 2 * np.arange(width * SUBPIXELS)[None, :] + 1 - width * SUBPIXELS
    v = 2 * np.arange(height * SUBPIXELS)[:, None] + 1 - height * SUBPIXELS
    radius = min(width, height) * SUBPIXELS * scale // 10
    far, near = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    match shape:
        case "circle":
            inside = u * u + v * v <= radius * radius
        case "ring":
            inside = (u * u + v * v <= radius * radius) & (4 * (u * u + v * v) >= radius * radius)
        case "square":
            inside = 10 * far <= 9 * radius
        case "diamond":
            inside = abs(u) + abs(v) <= radius
        case "cross":
            inside = (far <= radius) & (3 * near <= radius)
        case "triangle":
            inside = (abs(v) <= radius) & (2 * abs(u) <= radius + v)
        case _:
            raise ValueError(f"unknown shape {shape!r}")
    return inside.reshape(height, SUBPIXELS, width, SUBPIXELS).sum(axis=(1, 3))


def plain(colour: tuple[int, int, int]) -> Paint:
    return Paint("plain", (colour,))


def coloured_shape(draw: random.Random) -> Scene:
    """One shape in one colour on white."""
    fill = plain(COLOURS[draw.choice(list(COLOURS))])
    return Scene(plain(WHITE), draw.choice(SHAPES), fill, draw.choice(SCALES))


def texture(draw: random.Random) -> Scene:
    """A pattern of one colour and charcoal over the whole picture."""
    return Scene(Paint(draw.choice(TEXTURES), (COLOURS[draw.choice(list(COLOURS))], CHARCOAL)))


def background(draw: random.Random) -> Scene:
    """Pale colours: plain, two of them with a horizon, or a gradient."""
    kind, names = draw.choice(BACKGROUNDS), draw.sample(list(PALE_COLOURS), 2)
    return Scene(Paint(kind, tuple(PALE_COLOURS[name] for name in names)))


@dataclass(frozen=True)
class Composition:
    """One multi-reference example. Every picture is a scene and its (width, height)."""

    task: str
    instruction: str
    references: tuple[tuple[Scene, tuple[int, int]], ...]
    target: tuple[Scene, tuple[int, int]]

    def images(self) -> list[np.ndarray]:
        """The references in order, then the target: (H, W, 3) uint8 each."""
        return [scene.render(*size) for scene, size in (*self.references, self.target)]


def compose(seed: int, split: str, row: int) -> Composition:
    """The example at a place: the same arguments always give the same example.

    The roles come in any order, so that the instruction's indices matter. The target has the size of the last
    reference, as upstream's multi-reference inference chooses it.
    """
    draw = random.Random(f"{seed}/{split}/{row}")
    task = draw.choice(TASKS)
    scenes, target, instruction = _TASKS[task](draw)
    order = draw.sample(range(len(scenes)), len(scenes))
    same_size = draw.random() < 0.75
    size = draw.choice(SIZES)
    references = tuple((scenes[role], size if same_size else draw.choice(SIZES)) for role in order)
    places = {f"r{role}": f"image {place + 1}" for place, role in enumerate(order)}
    return Composition(task, instruction.format(**places), references, (target, references[-1][1]))


def _recolour(draw: random.Random):
    figure = coloured_shape(draw)
    name = draw.choice([name for name, colour in COLOURS.items() if plain(colour) != figure.fill])
    text = draw.choice(["Make the shape of {r0} ", "Paint the shape of {r0} "]) + f"{name}."
    return [figure], replace(figure, fill=plain(COLOURS[name])), text


def _on_colour(draw: random.Random):
    figure, name = coloured_shape(draw), draw.choice(list(PALE_COLOURS))
    text = draw.choice(["Put the shape of {r0} on a ", "Show the shape of {r0} on a "]) + f"{name} background."
    return [figure], replace(figure, background=plain(PALE_COLOURS[name])), text


def _on_background(draw: random.Random):
    figure, behind = coloured_shape(draw), background(draw)
    text = draw.choice(
        ["Put the shape of {r0} on the background of {r1}.", "Use {r1} as the background for the shape of {r0}."]
    )
    return [figure, behind], replace(figure, background=behind.background), text


def _borrow_colour(draw: random.Random):
    figure = other = coloured_shape(draw)
    while other.fill == figure.fill or other.shape == figure.shape:
        other = coloured_shape(draw)
    text = draw.choice(
        ["Draw the shape of {r0} in the colour of {r1}.", "Use the colour of {r1} for the shape of {r0}."]
    )
    return [figure, other], replace(figure, fill=other.fill), text


def _borrow_texture(draw: random.Random):
    figure, pattern = coloured_shape(draw), texture(draw)
    text = draw.choice(
        ["Fill the shape of {r0} with the texture of {r1}.", "Use the texture of {r1} for the shape of {r0}."]
    )
    return [figure, pattern], replace(figure, fill=pattern.background), text


def _compose(draw: random.Random):
    figure, pattern, behind = coloured_shape(draw), texture(draw), background(draw)
    text = draw.choice(
        [
            "Put the shape of {r0}, filled with the texture of {r1}, on the background of {r2}.",
            "On the background of {r2}, draw the shape of {r0} with the texture of {r1}.",
        ]
    )
    return [figure, pattern, behind], replace(figure, fill=pattern.background, background=behind.background), text


def _compose_framed(draw: random.Random):
    scenes, target, text = _compose(draw)
    card = plain(COLOURS[draw.choice(list(COLOURS))])
    text = text[:-1] + ", and frame it in the colour of {r3}."
    return [*scenes, Scene(card)], replace(target, frame=card), text


_TASKS = {
    "recolour": _recolour,
    "on_colour": _on_colour,
    "on_background": _on_background,
    "borrow_colour": _borrow_colour,
    "borrow_texture": _borrow_texture,
    "compose": _compose,
    "compose_framed": _compose_framed,
}


def describe(scene: Scene) -> str:
    """A caption of a coloured shape on a plain background."""
    colour = colour_name(scene.fill)
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {scene.shape} on a {colour_name(scene.background)} background"


def captioned_scene(draw: random.Random) -> tuple[Scene, str]:
    """A coloured shape on a pale background, for text-to-image, editing and question rows."""
    scene = replace(coloured_shape(draw), background=plain(PALE_COLOURS[draw.choice(list(PALE_COLOURS))]))
    return scene, describe(scene)


def colour_name(paint: Paint) -> str:
    """Name of a plain paint's colour."""
    return next(name for name, value in (COLOURS | PALE_COLOURS | {"white": WHITE}).items() if plain(value) == paint)
