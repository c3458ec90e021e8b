"""Pictures of scenes: 64 x 64, every thing within its cell, anti-aliased; the same scene gives the same pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter

from loom_jax.data.world.scene import PLACES, Scene, Thing

SIDE = 64
"""Pixels of a side of a picture."""
CELL = 16
"""Pixels of a side of the cell that a thing may fill; the cells fill the picture.

Patterns repeat every CELL pixels, or a divisor of it: where a latent token and a ViT patch show one cell, a thing is
the same to a model wherever it stands.
"""

RGB = {
    "red": (214, 40, 46),
    "orange": (246, 132, 24),
    "yellow": (250, 208, 20),
    "green": (38, 146, 72),
    "blue": (40, 88, 212),
    "purple": (134, 60, 172),
}
RADIUS = {"large": 7.3, "small": 5.0}
INK = np.asarray((44, 42, 52), np.float32)
NIGHT = np.asarray((14, 20, 54), np.float32)
STROKE = 0.8
"""Width of an outline in pixels."""
_FINE = 16
"""Samples a pixel, down and across, that anti-aliasing takes the mean of."""


def cell_slices(place: str) -> tuple[slice, slice]:
    """Returns the rows and columns of the cell of a place."""
    row, column = divmod(PLACES.index(place), SIDE // CELL)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Returns pictures of scenes, uint8 [N, 64, 64, 3]."""
    out = np.stack([background(scene.style, scene.background) for scene in scenes])
    for picture, scene in zip(out, scenes, strict=True):
        for thing in scene.things:
            cell = picture[cell_slices(thing.place)]
            alpha, colour = sprite(scene.style, thing)
            cell *= 1 - alpha
            cell += colour
    return np.rint(out).astype(np.uint8)


def sprite(style: str, thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Returns how a thing covers its cell: opacity, float32 [16, 16, 1], and colour times opacity, [16, 16, 3]."""
    return _sprite(style, thing.shape, thing.colour, thing.size)


@functools.cache
def _sprite(style: str, shape: str, colour: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    whole, inner = _masks(shape, size)
    fill = np.asarray(RGB[colour], np.float32) * np.ones((CELL, CELL, 3), np.float32)
    if style == "pastel":
        fill = _towards(fill, 255, 0.5)
    elif style == "night":
        fill = _towards(fill, 255, 0.15)
    elif style == "stripes":
        fill = np.where(_hatch()[:CELL, :CELL], fill, _towards(fill, 255, 0.5))
    if style == "outline":
        return whole, fill * inner + INK * (whole - inner)
    return whole, fill * whole


@functools.cache
def _masks(shape: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the opacity of a shape and of what an outline leaves of it, float32 [16, 16, 1] each."""
    fine = PILImage.new("L", (CELL * _FINE, CELL * _FINE))
    _draw_shape(ImageDraw.Draw(fine), shape, CELL * _FINE / 2, RADIUS[size] * _FINE)
    inner = fine
    for _ in range(round(STROKE * _FINE / 2)):
        inner = inner.filter(ImageFilter.MinFilter(5))
    return _shrink(fine), _shrink(inner)


def _shrink(mask: PILImage.Image) -> np.ndarray:
    return np.asarray(mask.reduce(_FINE), np.float32)[..., None] / 255


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, middle: float, radius: float) -> None:
    def polygon(points: Sequence[tuple[float, float]]) -> None:
        canvas.polygon([(middle + radius * x, middle + radius * y) for x, y in points], fill=255)

    if shape == "circle":
        polygon([(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 120)])
    elif shape == "square":
        polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    elif shape == "triangle":
        polygon([(0, -0.98), (1.04, 0.84), (-1.04, 0.84)])
    elif shape == "star":
        turns = [(k * math.pi / 5, 1.08 if k % 2 == 0 else 0.47) for k in range(10)]
        polygon([(r * math.sin(a), 0.06 - r * math.cos(a)) for a, r in turns])
    elif shape == "heart":
        angles = np.linspace(0, 2 * math.pi, 120)
        down = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
        polygon([(float(x), float(y)) for x, y in zip(np.sin(angles) ** 3, -0.14 - down / 15.5, strict=True)])
    else:
        a, b = 0.34, 1.0
        half = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        polygon([*half, *((-x, -y) for x, y in half)])


@functools.cache
def background(style: str, name: str) -> np.ndarray:
    """Returns a background in a style, float32 [64, 64, 3], 0..255. Never change it in place."""
    picture = _ground(name)
    if style == "pastel":
        picture = _towards(picture, 255, 0.5)
    elif style == "night":
        picture = _towards(picture * np.asarray((0.7, 0.85, 1.0), np.float32), NIGHT, 0.6)
    elif style == "stripes":
        picture = np.where(_hatch(), picture, _towards(picture, 255, 0.4))
        picture = picture - 8
    elif style == "outline":
        picture = picture.copy()
        picture[[0, -1]] = INK
        picture[:, [0, -1]] = INK
    picture.flags.writeable = False
    return picture


def _ground(name: str) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5
    if name == "meadow":
        tufts = np.maximum(0, np.sin(x * math.pi / 4 + math.pi / 2 * np.floor(y / 8)) * np.sin(y * math.pi / 8)) ** 3
        return _blend((208, 234, 176), (150, 204, 128), tufts)
    if name == "beach":
        ripples = 0.5 + 0.5 * np.sin(2 * math.pi / CELL * y + 1.1 * np.sin(2 * math.pi / CELL * x))
        return _blend((250, 236, 202), (236, 212, 162), ripples)
    if name == "sky":
        sky = _blend((166, 208, 248), (226, 241, 253), y / SIDE)
        clouds = ((14, 20, 13, 5), (24, 16, 9, 6), (46, 40, 13, 5), (38, 36, 8, 5), (12, 58, 10, 4))
        white = np.maximum.reduce([1 - ((x - a) / w) ** 2 - ((y - b) / h) ** 2 for a, b, w, h in clouds])
        return _blend(sky, (255, 255, 255), np.clip(2.5 * white, 0, 0.85))
    if name == "sea":
        waves = np.maximum(0, np.sin(4 * math.pi / CELL * y + 0.9 * np.sin(2 * math.pi / CELL * x))) ** 4
        return _blend((142, 212, 214), (204, 240, 238), waves)
    if name == "dusk":
        return _blend((252, 208, 186), (206, 182, 228), y / SIDE)
    return _blend((252, 250, 244), (252, 250, 244), y)


def _hatch() -> np.ndarray:
    """Diagonal stripes, bool [64, 64, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return ((x + y) // 4 % 2 == 0)[..., None]


def _blend(first: np.ndarray | Sequence[float], second: Sequence[float], share: np.ndarray) -> np.ndarray:
    share = share[..., None]
    return (np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share).astype(np.float32)


def _towards(picture: np.ndarray, colour: np.ndarray | float, share: float) -> np.ndarray:
    return (picture * (1 - share) + np.asarray(colour, np.float32) * share).astype(np.float32)
