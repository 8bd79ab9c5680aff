"""Seeded generator of labelled clips: one coloured, textured shape that moves at a constant speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE = 72
NUM_FRAMES = 17
FRAME_RATE = 25
BACKGROUND = 0.1
SPEED = 1
"""Pixels per frame."""
RADII = (11, 12)
SUPERSAMPLING = 4
OFF_CENTRE = 4
"""Pixels from the middle of the picture to the centre of a shape that is about to move, at most."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15),
}
TEXTURES = ("plain", "striped")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Label:
    """What a clip shows."""

    texture: str
    colour: str
    shape: str
    direction: str

    @property
    def prompt(self) -> str:
        """The label as a sentence."""
        return f"a {self.texture} {self.colour} {self.shape} moving {self.direction}"


LABELS = tuple(Label(*names) for names in product(TEXTURES, COLOURS, SHAPES, DIRECTIONS))
VOCABULARY = ("a", "moving", *TEXTURES, *COLOURS, *SHAPES, *DIRECTIONS)


def is_painted(texture: str, shape: str, x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    """Which points are painted, of a shape of radius 1 round the origin; y points down."""
    inside: npt.NDArray[np.bool_]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.9
    elif shape == "triangle":
        inside = (y <= 1) & (2 * np.abs(x) <= y + 1)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    if texture == "striped":
        inside &= np.floor((y + 1) * 2.5) % 2 == 0
    elif texture != "plain":
        raise ValueError(f"unknown texture {texture!r}; known: {', '.join(TEXTURES)}")
    return inside


def shape_mask(texture: str, shape: str, centre_x: float, centre_y: float, radius: float) -> Array:
    """Coverage in 0..1 of each pixel by a shape whose size is about the same for all three kinds."""
    steps = (np.arange(SIZE * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = (steps - centre_x) / radius, (steps - centre_y) / radius
    painted = is_painted(texture, shape, x[None], y[:, None])
    blocks = painted.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    covered: Array = blocks.mean(axis=(1, 3), dtype=np.float32)
    return covered


def make_clip(label: Label, rng: np.random.Generator) -> Array:
    """A clip [frames, height, width, 3] in 0..1 for a label; the shape never leaves the picture."""
    radius = int(rng.choice(RADII))
    step = SPEED * np.array(DIRECTIONS[label.direction])
    path = step[None] * (np.arange(NUM_FRAMES)[:, None] - NUM_FRAMES // 2)
    slack = SIZE // 2 - radius - 1 - path.max(axis=0)
    centres = SIZE // 2 + rng.integers(-slack, slack + 1) + path
    return draw(label, centres, radius)


def make_picture(label: Label, rng: np.random.Generator) -> Array:
    """A picture [height, width, 3] in 0..1 of a shape near the middle: it could move in any direction."""
    radius = int(rng.choice(RADII))
    centre = SIZE // 2 + rng.integers(-OFF_CENTRE, OFF_CENTRE + 1, size=(1, 2))
    picture: Array = draw(label, centre, radius)[0]
    return picture


def draw(label: Label, centres: npt.NDArray[np.int64], radius: float) -> Array:
    """Frames [centre, height, width, 3] in 0..1 of a label's shape at each of some centres (x, y).

    Centres are whole pixels, so the shape is drawn once and shifted.
    """
    middle = SIZE // 2
    mask = shape_mask(label.texture, label.shape, middle, middle, radius)
    shifted = [np.roll(mask, (y - middle, x - middle), axis=(0, 1)) for x, y in centres]
    masks = np.stack(shifted)[..., None]
    colour = np.array(COLOURS[label.colour], dtype=np.float32)
    painted = masks * colour + (1 - masks) * np.float32(BACKGROUND)
    return painted.astype(np.float32)


def clips(seed: int) -> Iterator[tuple[Label, Array]]:
    """Endless labelled clips; each run of 96 holds every label once, in a random order."""
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(LABELS)):
            yield LABELS[index], make_clip(LABELS[index], rng)
