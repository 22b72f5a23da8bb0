"""Built-in images: seeded, coloured scenes that need no network and never run out.

A scene is a sky with a sun, hills, a ground and a few large shaded shapes. What makes it a test of patch-wise generation is
that its identity is global: one hue decides every colour, one sun lights every shape, and the shapes are large and lie about
the middle, where the borders between patches run for every divider. A model that cannot see the whole image draws patches
whose colours and outlines do not meet.

Geometry is in units of the image's shorter side with the origin in its middle, so a scene is the same picture at every
resolution. Pixels are computed with additions, multiplications, minima and square roots only, which IEEE 754 rounds the same
way everywhere: a scene does not depend on the machine, the process, or the batch it was drawn in.

Shapes of arrays: N scenes, H, W pixels; per-scene values are (N, 1, 1), columns (1, 1, W), rows (1, H, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Part of a data set's fingerprint: raise it whenever the same seed gives another picture."""
NUM_SHAPES = 5
_DRAWS_PER_SCENE = 32 + 12 * NUM_SHAPES
_PIXELS_PER_CHUNK = 32_768  # keeps a chunk's working arrays inside a core's cache

Array = NDArray[np.float32]


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
        images[start : start + chunk] = _render(draws, height, width)
    return images


def _draws(seed: int, index: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) that a scene is made from; Philox (Salmon et al. 2011) is keyed, so any scene is drawn directly."""
    bits = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(_DRAWS_PER_SCENE)
    return (bits >> np.uint64(11)) * 2.0**-53


class _Draws:
    """Hands out the draws of N scenes in order, one (N, 1, 1) column at a time."""

    def __init__(self, draws: NDArray[np.float64]) -> None:
        self._draws, self._next = draws, 0

    def between(self, low: float, high: float) -> NDArray[np.float64]:
        column = self._draws[:, self._next, None, None]
        self._next += 1
        return low + (high - low) * column

    def chance(self, probability: float) -> NDArray[np.bool_]:
        return self.between(0, 1) < probability


def _rgb(hue: NDArray[np.float64], saturation: NDArray[np.float64] | float, value: NDArray[np.float64] | float) -> list[Array]:
    """HSV to three (N, 1, 1) arrays of red, green, blue in [0, 1]."""
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append((value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32))
    return channels


def _blend(image: list[Array], colour: Sequence[Array], alpha: Array) -> list[Array]:
    """``colour`` laid over ``image`` with opacity ``alpha`` (N, H, W), channel by channel."""
    return [under + alpha * (over - under) for under, over in zip(image, colour, strict=True)]


def _coverage(distance: Array, pixels_per_unit: np.float32) -> Array:
    """How much of a pixel lies inside an outline at a signed distance (negative inside): a one-pixel ramp, so edges are
    smooth."""
    return np.clip(np.float32(0.5) - distance * pixels_per_unit, 0, 1)


def _f32(values: NDArray[np.float64]) -> Array:
    return values.astype(np.float32)


def _render(draws: NDArray[np.float64], height: int, width: int) -> NDArray[np.uint8]:
    """Draws (N, K) to uint8 (N, 3, H, W): sky, sun, hills, ground, then the shapes from the largest to the smallest."""
    draw = _Draws(draws)
    scale = np.float32(min(height, width))  # pixels per unit
    x = ((np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) / scale)[None, None, :]
    y = ((np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / scale)[None, :, None]

    hue = draw.between(0, 1)
    partner = hue + np.where(draw.chance(0.5), 0.5, draw.between(0.08, 0.2))  # complementary or neighbouring
    daylight = draw.between(0.55, 1.0)
    horizon = _f32(draw.between(-0.1, 0.2))
    sun_x, sun_y, sun_radius = _f32(draw.between(-0.38, 0.38)), _f32(draw.between(-0.4, 0.0)), _f32(draw.between(0.08, 0.2))

    sky_top = _rgb(hue, draw.between(0.5, 0.85), daylight * 0.75)
    sky_low = _rgb(hue + 0.06, draw.between(0.15, 0.4), daylight)
    sun_colour = _rgb(hue + 0.08, draw.between(0.05, 0.3), 0.6 + 0.4 * daylight)
    depth = np.clip((y + np.float32(0.5)) / (horizon + np.float32(0.5)), 0, 1)  # 0 at the top, 1 at the horizon
    image = [
        np.broadcast_to(top + depth * (low - top), (len(draws), height, width))
        for top, low in zip(sky_top, sky_low, strict=True)
    ]

    dx, dy = x - sun_x, y - sun_y
    radius_squared = dx * dx + dy * dy
    glow = np.float32(0.55) / (1 + radius_squared / (sun_radius * sun_radius))
    image = _blend(image, sun_colour, glow)
    image = _blend(image, sun_colour, _coverage(np.sqrt(radius_squared) - sun_radius, scale))

    ridge = np.zeros_like(x)
    for _ in range(3):
        top, middle, spread = _f32(draw.between(0.04, 0.22)), _f32(draw.between(-0.6, 0.6)), _f32(draw.between(0.2, 0.5))
        across = (x - middle) / spread
        ridge = np.maximum(ridge, top * (1 - across * across))
    hill = _rgb(hue + 0.03, draw.between(0.3, 0.6), daylight * draw.between(0.45, 0.65))
    image = _blend(image, hill, _coverage(horizon - ridge - y, scale))

    near = np.clip((y - horizon) / (np.float32(0.5) - horizon), 0, 1)
    far_ground = _rgb(partner, draw.between(0.25, 0.5), daylight * 0.75)
    near_ground = _rgb(partner, draw.between(0.5, 0.8), daylight * 0.4)
    ground = [far + near * (close - far) for far, close in zip(far_ground, near_ground, strict=True)]
    image = _blend(image, ground, _coverage(horizon - y, scale))

    for number in range(NUM_SHAPES):
        image = _shape(image, draw, number, x, y, scale, hue, partner, daylight, sun_x, sun_y)
    return np.stack([(np.clip(c, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8) for c in image], axis=1)


def _shape(
    image: list[Array],
    draw: _Draws,
    number: int,
    x: Array,
    y: Array,
    scale: np.float32,
    hue: NDArray[np.float64],
    partner: NDArray[np.float64],
    daylight: NDArray[np.float64],
    sun_x: Array,
    sun_y: Array,
) -> list[Array]:
    """One rotated rectangle, triangle, disc or ring with a soft contact shadow, lit from the sun's side."""
    kind = draw.between(0, 4)
    spread = 0.26 + 0.04 * number
    centre_x, centre_y = _f32(draw.between(-spread, spread)), _f32(draw.between(-spread, spread) + 0.06)
    extent = draw.between(0.16, 0.26) * (1 - 0.12 * number)
    aspect = draw.between(0.35, 1.0)
    angle = draw.between(0, 2 * np.pi)
    px, py = x - centre_x, y - centre_y  # (N, 1, W), (N, H, 1)

    # A convex outline is the largest of its signed distances to four straight edges (a triangle repeats one).
    triangle = (kind >= 1) & (kind < 2)
    outline: Array | None = None
    for edge in range(4):
        turn = np.where(triangle, 2 * np.pi / 3 * (edge % 3), np.pi / 2 * edge)
        offset = np.where(triangle, extent * 0.62, extent * (aspect if edge % 2 else 1.0))
        plane = _f32(np.cos(angle + turn)) * px + (_f32(np.sin(angle + turn)) * py - _f32(offset))
        outline = plane if outline is None else np.maximum(outline, plane)
    radius = np.sqrt(px * px + py * py)
    ring = np.where(kind >= 3, extent * 0.72, 0.0)
    thickness = np.where(kind >= 3, extent * 0.22, extent * 0.85)
    round_outline = np.abs(radius - _f32(ring)) - _f32(thickness)
    assert outline is not None
    distance = np.where(kind >= 2, round_outline, outline)

    base = np.where(draw.chance(0.6), hue, partner) + draw.between(-0.05, 0.05)
    colour = _rgb(base, draw.between(0.45, 0.95), daylight * draw.between(0.6, 1.0))
    to_sun_x, to_sun_y = sun_x - centre_x, sun_y - centre_y
    length = np.sqrt(to_sun_x * to_sun_x + to_sun_y * to_sun_y) + np.float32(0.05)
    lit = (to_sun_x / length) * px + ((to_sun_y / length) * py + np.float32(0.0))
    light = np.clip(np.float32(0.85) + np.float32(1.6) * lit, np.float32(0.35), np.float32(1.25))

    shadow = np.float32(0.4) * np.clip(1 - distance * np.float32(14), 0, 1)
    image = [channel - shadow * channel for channel in image]
    return _blend(image, [light * channel for channel in colour], _coverage(distance, scale))
