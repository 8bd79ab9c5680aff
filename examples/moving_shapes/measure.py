"""Image analysis of a clip: which texture, colour and shape it has, which way it moves, and how cleanly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from .clips import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    TEXTURES,
    Array,
    Label,
    is_painted,
    shape_mask,
)

UNCLEAR = "unclear"
FOREGROUND_LEVEL = 0.3
SMALLEST_AREA = 20
COLOUR_TOLERANCE = 0.4
SMALLEST_OVERLAP = 0.6
SMALLEST_MOVE = 4.0

FRAME_STEP = 2
"""Every other frame is compared with the shapes, which takes the longest."""


@dataclass(frozen=True)
class Measurement:
    """What a clip was found to show; each name may be `unclear`."""

    texture: str
    colour: str
    shape: str
    direction: str
    overlap: float
    jitter: float

    def matches(self, label: Label) -> dict[str, bool]:
        """Which parts of the label the clip shows."""
        found = {
            "texture": self.texture == label.texture,
            "colour": self.colour == label.colour,
            "shape": self.shape == label.shape,
            "direction": self.direction == label.direction,
        }
        return {**found, "all": all(found.values())}


def measure(clip: Array) -> Measurement:
    """Measure a clip [frames, height, width, 3] in 0..1."""
    colour = find_colour(clip)
    if colour == UNCLEAR:
        return Measurement(UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR, 0.0, float("nan"))
    masks = coverage(clip, colour)
    if (masks.sum(axis=(1, 2)) < SMALLEST_AREA).any():
        return Measurement(UNCLEAR, colour, UNCLEAR, UNCLEAR, 0.0, float("nan"))
    centres = centres_of_mass(masks)
    texture, shape, overlap = find_shape(masks[::FRAME_STEP], centres[::FRAME_STEP])
    direction, jitter = find_direction(centres)
    return Measurement(texture, colour, shape, direction, overlap, jitter)


def find_colour(clip: Array) -> str:
    """The named colour nearest to the median colour of what stands out from the background."""
    foreground = clip[np.abs(clip - BACKGROUND).max(axis=-1) > FOREGROUND_LEVEL]
    if len(foreground) < SMALLEST_AREA:
        return UNCLEAR
    typical = np.median(foreground, axis=0)
    distances = {name: float(np.linalg.norm(typical - np.array(rgb))) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < COLOUR_TOLERANCE else UNCLEAR


def coverage(clip: Array, colour: str) -> Array:
    """How far each pixel [frames, height, width] has gone from the background to the colour, in 0..1."""
    towards = np.array(COLOURS[colour]) - BACKGROUND
    along = ((clip - BACKGROUND) @ towards) / (towards @ towards)
    along = np.clip(along, 0, 1)
    # A faint haze over the whole picture would otherwise drag the centre of mass to the middle.
    return np.where(along > FOREGROUND_LEVEL, along, 0).astype(np.float32)


def centres_of_mass(masks: Array) -> Array:
    """Centre (x, y) of the mask of each frame, in pixels."""
    steps = np.arange(SIZE) + 0.5
    areas = masks.sum(axis=(1, 2))
    x = (masks.sum(axis=1) * steps).sum(axis=1) / areas
    y = (masks.sum(axis=2) * steps).sum(axis=1) / areas
    return np.stack([x, y], axis=1).astype(np.float32)


@cache
def area_and_offset(texture: str, shape: str) -> tuple[float, float]:
    """The painted area of a shape at radius 1, and how far below its centre its centre of mass lies."""
    steps = np.linspace(-1, 1, 401, dtype=np.float32)
    painted = is_painted(texture, shape, steps[None], steps[:, None])
    return float(painted.mean() * 4), float((painted * steps[:, None]).sum() / painted.sum())


def find_shape(masks: Array, centres: Array) -> tuple[str, str, float]:
    """The texture and shape that overlap the masks best at the same place with the same area; how well."""
    overlaps = {}
    for texture, shape in product(TEXTURES, SHAPES):
        area, offset = area_and_offset(texture, shape)
        ratios = []
        for mask, (x, y) in zip(masks, centres, strict=True):
            radius = float(np.sqrt(mask.sum() / area))
            template = shape_mask(texture, shape, float(x), float(y) - offset * radius, radius)
            ratios.append(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
        overlaps[texture, shape] = float(np.mean(ratios))
    best = max(overlaps, key=lambda names: overlaps[names])
    texture, shape = best if overlaps[best] >= SMALLEST_OVERLAP else (UNCLEAR, UNCLEAR)
    return texture, shape, overlaps[best]


def find_direction(centres: Array) -> tuple[str, float]:
    """Direction of the straight line fitted to the path, and the RMS distance from it in pixels."""
    times = np.arange(len(centres)) - (len(centres) - 1) / 2
    velocity = times @ (centres - centres.mean(axis=0)) / (times @ times)
    residual = centres - centres.mean(axis=0) - times[:, None] * velocity
    jitter = float(np.sqrt((residual**2).sum(axis=1).mean()))
    move = velocity * (len(centres) - 1)
    if np.abs(move).max() < SMALLEST_MOVE:
        return UNCLEAR, jitter
    axis = int(np.abs(move).argmax())
    step = [0, 0]
    step[axis] = int(np.sign(move[axis]))
    return next(name for name, unit in DIRECTIONS.items() if list(unit) == step), jitter


def difference(picture: Array, other: Array) -> float:
    """Mean absolute difference of two pictures in 0..1, in levels of 255."""
    return float(np.abs(picture - other).mean() * 255)
