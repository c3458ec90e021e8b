"""Reads pictures back into scenes, by comparing them with every picture that there could be.

For each style and background, each cell is compared with the bare background and with every thing that may stand there;
the style and background with the least difference over the whole picture win. Averages over 4 x 4 pixels choose the few
styles and backgrounds that are worth comparing pixel by pixel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from loom_jax.core import InputError
from loom_jax.data.world.render import CELL, SIDE, background, cell_slices, sprite
from loom_jax.data.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, STYLES, Scene, Thing

CLEAR = 0.18
"""A picture is clear if no cell differs from what was read by more (root mean square, of 1)."""
FINALISTS = 3
"""Styles and backgrounds that are compared pixel by pixel."""
BLOCK = 4
CHUNK = 2048
"""Pictures that are read at once: bounds the memory."""

_KINDS: tuple[tuple[str, str, str] | None, ...] = (None, *itertools.product(SIZES, COLOURS, SHAPES))
"""What may be in a cell."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read in a picture.

    Attributes:
      scene: the nearest scene.
      error: difference from its picture in the worst cell, root mean square, of 1.
    """

    scene: Scene
    error: float

    @property
    def clear(self) -> bool:
        """Whether the picture shows that scene; else it shows nothing of this world."""
        return self.error <= CLEAR


def read_pictures(pictures: np.ndarray, styles: Sequence[str] = STYLES) -> list[Reading]:
    """Returns what each picture shows.

    Args:
      pictures: uint8 [N, 64, 64, 3].
      styles: that are to be thought of.

    Raises:
      InputError: pictures of another size.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (SIDE, SIDE, 3) or pictures.dtype != np.uint8:
        raise InputError(f"pictures are {pictures.dtype} {pictures.shape}: expected uint8 (N, {SIDE}, {SIDE}, 3)")
    out: list[Reading] = []
    for start in range(0, len(pictures), CHUNK):
        out += _read_chunk(pictures[start : start + CHUNK].astype(np.float32) / 255, tuple(styles))
    return out


def _read_chunk(pictures: np.ndarray, styles: tuple[str, ...]) -> list[Reading]:
    count, grounds = len(pictures), list(itertools.product(styles, BACKGROUNDS))
    finalists = np.argsort(_coarse_totals(pictures, styles), axis=1)[:, :FINALISTS]
    best = np.full(count, np.inf, np.float32)
    ground_of, kinds, errors = np.zeros(count, int), np.zeros((count, len(PLACES)), int), np.zeros(count, np.float32)
    fine = _cut(pictures, 1)
    for number, ground in enumerate(grounds):
        rows = np.flatnonzero((finalists == number).any(1))
        if not len(rows):
            continue
        total, kind, error = _compare([part[rows] for part in fine], *ground)
        better = total < best[rows]
        chosen = rows[better]
        best[chosen], ground_of[chosen] = total[better], number
        kinds[chosen], errors[chosen] = kind[better], error[better]
    return [
        Reading(_scene(grounds[ground], kind), float(error))
        for ground, kind, error in zip(ground_of, kinds, errors, strict=True)
    ]


def _scene(ground: tuple[str, str], kinds: np.ndarray) -> Scene:
    style, name = ground
    found = zip((_KINDS[kind] for kind in kinds), PLACES, strict=True)
    things = [Thing(kind[0], kind[1], kind[2], place) for kind, place in found if kind is not None]
    return Scene(name, frozenset(things), style)


def _coarse_totals(pictures: np.ndarray, styles: tuple[str, ...]) -> np.ndarray:
    """Returns sums of squares [N, G] between averages of each picture and of the nearest of each style and background.

    One product for each place, and not one for each style and background as well: a product has its cost in threads.
    """
    *cells, own = _cut(pictures, BLOCK)
    templates, squares = _coarse_templates(styles)
    totals = own.sum(1, keepdims=True)
    for place, cell in enumerate(cells):
        apart = squares[place] - 2 * (cell @ templates[place].T)
        totals = totals + apart.reshape(len(cell), -1, len(_KINDS)).min(2)
    return totals


@functools.cache
def _coarse_templates(styles: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns `_templates` of all styles and backgrounds: [16, G kinds, values] and [16, G kinds]."""
    parts = [_templates(*ground, BLOCK) for ground in itertools.product(styles, BACKGROUNDS)]
    templates, squares = zip(*parts, strict=True)
    return np.concatenate(templates, 1), np.concatenate(squares, 1)


def _compare(parts: Sequence[np.ndarray], style: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares pictures, cut into parts, with all pictures of one style and background.

    Returns:
      [N] sums of squares over the nearest one, its kinds [N, 16], and its difference in the worst cell, [N].
    """
    *cells, own = parts
    templates, squares = _templates(style, name, 1)
    distances = np.empty((len(own), len(PLACES)), np.float32)
    kinds = np.empty((len(own), len(PLACES)), int)
    for place, cell in enumerate(cells):
        apart = own[:, place, None] - 2 * (cell @ templates[place].T) + squares[place]
        kinds[:, place] = apart.argmin(1)
        distances[:, place] = np.maximum(apart.min(1), 0)
    return distances.sum(1), kinds, np.sqrt(distances.max(1) / cells[0].shape[1])


@functools.cache
def _templates(style: str, name: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns every content of every cell, [16, kinds, values], and their squares summed, [16, kinds]."""
    ground = background(style, name)
    cells = []
    for place in PLACES:
        bare = ground[cell_slices(place)]
        sprites = [sprite(style, Thing(*kind, place)) for kind in _KINDS if kind is not None]
        drawn = [bare, *(bare * (1 - alpha) + colour for alpha, colour in sprites)]
        cells.append(_flat(np.stack(drawn) / 255, block))
    templates = np.stack(cells)
    return templates, (templates**2).sum(-1)


def _cut(pictures: np.ndarray, block: int) -> list[np.ndarray]:
    """Returns the sixteen cells averaged over blocks, [N, values] each, and their sums of squares, [N, 16]."""
    cells = [_flat(pictures[(slice(None), *cell_slices(place))], block) for place in PLACES]
    return [*cells, np.stack([np.einsum("nv,nv->n", cell, cell) for cell in cells], 1)]


def _flat(cells: np.ndarray, block: int) -> np.ndarray:
    """Returns cells [N, 16, 16, 3] averaged over blocks, as float32 [N, values]."""
    side = CELL // block
    blocks = cells.reshape(len(cells), side, block, side, block, 3).mean((2, 4), dtype=np.float32)
    return blocks.reshape(len(cells), -1)
