"""Seeded generator of labelled clips: one coloured shape that moves at a constant speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

SIZE = 48
NUM_FRAMES = 9
FRAME_RATE = 25
BACKGROUND = 0.1
SPEEDS = (1, 2)
RADII = (8, 9)
SUPERSAMPLING = 4
OFF_CENTRE = 4
"""Pixels from the middle of the picture to the centre of a shape that is about to move, at most."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Label:
    """What a clip shows."""

    colour: str
    shape: str
    direction: str

    @property
    def prompt(self) -> str:
        """The label as a sentence."""
        return f"a {self.colour} {self.shape} moving {self.direction}"


LABELS = tuple(Label(*names) for names in product(COLOURS, SHAPES, DIRECTIONS))
VOCABULARY = ("a", "moving", *COLOURS, *SHAPES, *DIRECTIONS)


def shape_mask(shape: str, centre_x: float, centre_y: float, radius: float) -> Array:
    """Coverage in 0..1 of each pixel by a shape whose size is about the same for all three kinds."""
    steps = (np.arange(SIZE * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = np.meshgrid(steps - centre_x, steps - centre_y)
    if shape == "circle":
        inside = x**2 + y**2 <= radius**2
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.9 * radius
    elif shape == "triangle":
        inside = (y <= radius) & (2 * np.abs(x) <= y + radius)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    blocks = inside.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    covered: Array = blocks.mean(axis=(1, 3), dtype=np.float32)
    return covered


def make_clip(label: Label, rng: np.random.Generator) -> Array:
    """A clip [frames, height, width, 3] in 0..1 for a label; the shape never leaves the picture.

    Places are whole pixels, which the autoencoder, with its patches of 8 pixels, learns sooner.
    """
    radius = int(rng.choice(RADII))
    step = int(rng.choice(SPEEDS)) * np.array(DIRECTIONS[label.direction])
    path = step[None] * (np.arange(NUM_FRAMES)[:, None] - NUM_FRAMES // 2)
    slack = SIZE // 2 - radius - 1 - path.max(axis=0)
    centres = SIZE // 2 + rng.integers(-slack, slack + 1) + path
    return draw(label.colour, label.shape, centres, radius)


def make_picture(colour: str, shape: str, rng: np.random.Generator) -> Array:
    """A picture [height, width, 3] in 0..1 of a shape near the middle: it could move in any direction."""
    radius = int(rng.choice(RADII))
    centre = SIZE // 2 + rng.integers(-OFF_CENTRE, OFF_CENTRE + 1, size=(1, 2))
    picture: Array = draw(colour, shape, centre, radius)[0]
    return picture


def draw(colour: str, shape: str, centres: npt.NDArray[np.int64], radius: float) -> Array:
    """Frames [centre, height, width, 3] in 0..1 of a shape at each of some centres (x, y)."""
    masks = np.stack([shape_mask(shape, x, y, radius) for x, y in centres])[..., None]
    painted = masks * np.array(COLOURS[colour], dtype=np.float32) + (1 - masks) * np.float32(BACKGROUND)
    return painted.astype(np.float32)


def clips(seed: int) -> Iterator[tuple[Label, Array]]:
    """Endless labelled clips; each run of 48 holds every label once, in a random order."""
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(LABELS)):
            yield LABELS[index], make_clip(LABELS[index], rng)
