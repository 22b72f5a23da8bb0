"""Built-in images: seeded, coloured scenes that need no network and never run out.

A scene is a sky with a sun, hills, a ground and a few large shaded shapes. What makes it a test of patch-wise generation is
that its identity is global: one hue decides every colour, one sun lights every shape from its side, and the shapes are large
and gather about the middle, where the borders between patches run for every divider. A model that cannot see the whole image
draws patches whose colours and outlines do not meet.

Geometry is in units of the image's shorter side with the origin in its middle, so a scene is the same picture at every
resolution. Pixels are computed by additions, multiplications, divisions, minima and square roots only, which IEEE 754 rounds
alike everywhere: a scene does not depend on the machine, the process, or the batch it was drawn in.

Shapes of arrays: N scenes of H × W pixels; what belongs to a scene is (N, 1, 1), to a column (1, 1, W), to a row (1, H, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 2
"""Part of a data set's fingerprint: raise it whenever the same seed gives another picture."""
DEFAULT_COUNT = 10_000
"""Images of the set where no number is given."""
NUM_SHAPES = 5
_DRAWS_PER_SCENE = 40 + 12 * NUM_SHAPES  # more than are used, so that a scene can gain a detail without changing elsewhere
_PIXELS_PER_CHUNK = 65_536  # enough to hide the cost of a call, little enough for a core's cache

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]


def scene(seed: int, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scene ``index`` of the stream ``seed`` at ``size`` (height, width): uint8 (H, W, 3)."""
    return np.ascontiguousarray(scenes(seed, [index], size)[0].transpose(1, 2, 0))


def scenes(seed: int, indices: Sequence[int] | NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Several scenes at once, each as it would be alone: uint8 (N, 3, H, W)."""
    height, width = size
    images = np.empty((len(indices), 3, height, width), np.uint8)
    chunk = max(1, _PIXELS_PER_CHUNK // (height * width))
    for start in range(0, len(indices), chunk):
        draws = np.stack([_draws(seed, int(index)) for index in indices[start : start + chunk]])
        images[start : start + chunk] = _render(_Draws(draws), height, width)
    return images


def _draws(seed: int, index: int) -> Doubles:
    """The numbers in [0, 1) that make a scene. Philox (Salmon et al. 2011) takes a key, so that any scene is drawn directly."""
    bits = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(_DRAWS_PER_SCENE)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Draws:
    """Hands out the draws of N scenes in order, one (N, 1, 1) at a time."""

    def __init__(self, draws: Doubles) -> None:
        self._draws, self._next = draws, 0

    def between(self, low: float, high: float) -> Doubles:
        self._next += 1
        return low + (high - low) * self._draws[:, self._next - 1, None, None]

    def chance(self, probability: float) -> NDArray[np.bool_]:
        return self.between(0, 1) < probability


@dataclass
class _Stage:
    """What all parts of a scene share: the pixels' places, the palette and the light."""

    x: Array  # (1, 1, W)
    y: Array  # (1, H, 1), downwards
    scale: np.float32  # pixels per unit
    hue: Doubles  # (N, 1, 1), like all that follows
    partner: Doubles  # the second hue
    daylight: Doubles
    horizon: Array
    sun_x: Array
    sun_y: Array

    def cover(self, distance: Array) -> Array:
        """How much of each pixel lies inside an outline at these signed distances (negative inside): a ramp one pixel wide."""
        return np.clip(np.float32(0.5) - distance * self.scale, 0, 1)


def _render(draw: _Draws, height: int, width: int) -> NDArray[np.uint8]:
    """The scenes of the draws: uint8 (N, 3, H, W)."""
    shorter = min(height, width)
    hue = draw.between(0, 1)
    stage = _Stage(
        x=((np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) / np.float32(shorter))[None, None, :],
        y=((np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / np.float32(shorter))[None, :, None],
        scale=np.float32(shorter),
        hue=hue,
        partner=hue + np.where(draw.chance(0.5), 0.5, draw.between(0.08, 0.2)),  # complementary or neighbouring
        daylight=draw.between(0.72, 1.0),
        horizon=_f32(draw.between(-0.08, 0.2)),
        sun_x=_f32(draw.between(-0.38, 0.38)),
        sun_y=_f32(draw.between(-0.4, -0.05)),
    )
    image = _backdrop(draw, stage)
    for number in range(NUM_SHAPES):  # from the largest, at the back, to the smallest
        image = _add_shape(image, draw, stage, number)
    return np.stack([(np.clip(c, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8) for c in image], axis=1)


def _backdrop(draw: _Draws, stage: _Stage) -> list[Array]:
    """Sky, sun, hills and ground: red, green, blue, each (N, H, W)."""
    x, y, hue, daylight, horizon = stage.x, stage.y, stage.hue, stage.daylight, stage.horizon
    to_horizon = np.clip((y + np.float32(0.5)) / (horizon + np.float32(0.5)), 0, 1)  # 0 at the top
    image = _gradient(
        _rgb(hue, draw.between(0.45, 0.8), daylight * 0.85),
        _rgb(hue + 0.06, draw.between(0.12, 0.35), daylight),
        to_horizon,
    )

    sun = _rgb(hue + 0.08, draw.between(0.05, 0.25), 0.5 + 0.5 * daylight)
    sun_radius = _f32(draw.between(0.09, 0.2))
    dx, dy = x - stage.sun_x, y - stage.sun_y
    squared = dx * dx + dy * dy
    image = _blend(image, sun, np.float32(0.5) / (1 + squared / (sun_radius * sun_radius)))  # its glow
    image = _blend(image, sun, stage.cover(np.sqrt(squared) - sun_radius))

    ridge = np.zeros_like(x)
    for _ in range(3):  # a hill is an arc of a parabola
        top, middle, spread = _f32(draw.between(0.05, 0.22)), _f32(draw.between(-0.6, 0.6)), _f32(draw.between(0.2, 0.5))
        across = (x - middle) / spread
        ridge = np.maximum(ridge, top * (1 - across * across))
    hill = _rgb(hue + 0.03, draw.between(0.3, 0.55), daylight * draw.between(0.5, 0.7))
    image = _blend(image, hill, stage.cover(horizon - ridge - y))

    nearness = np.clip((y - horizon) / (np.float32(0.5) - horizon), 0, 1)
    far = _rgb(stage.partner, draw.between(0.2, 0.45), daylight * 0.85)
    near = _rgb(stage.partner, draw.between(0.45, 0.75), daylight * 0.55)
    return _blend(image, _gradient(far, near, nearness), stage.cover(horizon - y))


def _add_shape(image: list[Array], draw: _Draws, stage: _Stage, number: int) -> list[Array]:
    """A rotated rectangle, a triangle, a disc or a ring with a soft shadow about it, lighter towards the sun."""
    kind = draw.between(0, 4)  # below 1 a rectangle, then triangle, disc, ring
    reach = 0.22 + 0.05 * number
    centre_x, centre_y = _f32(draw.between(-reach, reach)), _f32(draw.between(-reach, reach) + 0.05)
    extent = draw.between(0.19, 0.29) * (1 - 0.12 * number)
    aspect, angle = draw.between(0.4, 1.0), draw.between(0, 2 * np.pi)
    px, py = stage.x - centre_x, stage.y - centre_y  # (N, 1, W), (N, H, 1)

    # The signed distance to a convex outline is the largest of those to its straight edges; a triangle has one edge twice.
    triangle = (kind >= 1) & (kind < 2)
    edges = []
    for edge in range(4):
        turn = angle + np.where(triangle, 2 * np.pi / 3 * (edge % 3), np.pi / 2 * edge)
        offset = extent * np.where(triangle, 0.6, aspect if edge % 2 else 1.0)
        edges.append(_f32(np.cos(turn)) * px + (_f32(np.sin(turn)) * py - _f32(offset)))
    straight = np.maximum(np.maximum(edges[0], edges[1]), np.maximum(edges[2], edges[3]))
    # A ring is what lies within its thickness of a circle; a disc, of a point.
    ring = kind >= 3
    circle, thickness = _f32(extent * np.where(ring, 0.75, 0.0)), _f32(extent * np.where(ring, 0.23, 0.88))
    curved = np.abs(np.sqrt(px * px + py * py) - circle) - thickness
    distance = np.where(kind >= 2, curved, straight)

    hue = np.where(draw.chance(0.55), stage.hue, stage.partner) + draw.between(-0.05, 0.05)
    colour = _rgb(hue, draw.between(0.5, 0.95), stage.daylight * draw.between(0.7, 1.0))
    sun_x, sun_y = stage.sun_x - centre_x, stage.sun_y - centre_y
    away = np.sqrt(sun_x * sun_x + sun_y * sun_y) + np.float32(0.05)
    towards_sun = sun_x / away * px + sun_y / away * py
    light = np.clip(np.float32(0.9) + np.float32(1.5) * towards_sun, np.float32(0.4), np.float32(1.3))

    shadow = np.float32(0.3) * np.clip(1 - distance * np.float32(16), 0, 1)
    image = [channel - shadow * channel for channel in image]
    return _blend(image, [light * channel for channel in colour], stage.cover(distance))


def _rgb(hue: Doubles, saturation: Doubles, value: Doubles) -> list[Array]:
    """Hue, saturation and value to red, green and blue in [0, 1], each (N, 1, 1)."""
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append(_f32(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)))
    return channels


def _gradient(start: Sequence[Array], end: Sequence[Array], along: Array) -> list[Array]:
    return [a + along * (b - a) for a, b in zip(start, end, strict=True)]


def _blend(image: Sequence[Array], colour: Sequence[Array], opacity: Array) -> list[Array]:
    """``colour`` laid over ``image``, channel by channel; ``opacity`` is (N, H, W)."""
    return [under + opacity * (over - under) for under, over in zip(image, colour, strict=True)]


def _f32(values: Doubles) -> Array:
    return values.astype(np.float32)
