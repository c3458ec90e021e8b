"""Rows that are drawn, not stored: coloured shapes with texts that describe them, for every recipe.

They need no files, so the tiny configuration trains on them anywhere, and tests know what is in a picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from loom_jax.core import ConfigError
from loom_jax.data.bad_rows import BadRow
from loom_jax.data.recipes import rows_of

COLOURS = {
    "red": (208, 44, 44),
    "green": (44, 150, 70),
    "blue": (48, 80, 200),
    "yellow": (232, 196, 40),
    "purple": (128, 60, 160),
    "white": (244, 244, 240),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "bar")
PLACES = {"left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72), "middle": (0.5, 0.5)}
SIDES = (64, 80, 96, 112, 128)
"""Pixels of a side of a picture."""
NUM_ROWS = 1 << 20
"""Rows of one epoch; the next one shows them in another order."""

Thing = tuple[str, str, str]
"""Colour, shape, place."""


class SyntheticRows:
    """Rows for one recipe; row i is always the same. `rows_of` says which recipes share rows.

    Raises:
      ConfigError: no such rows can be drawn.
    """

    blocks: Sequence[int] = ()
    bad_files: Sequence[BadRow] = ()

    def __init__(self, recipe: str):
        rows = rows_of(recipe)
        if rows not in _DRAWN:
            raise ConfigError(f"no synthetic rows for recipe {recipe!r}: there are rows for {', '.join(_DRAWN)}")
        self._recipe = rows

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _DRAWN[self._recipe](np.random.default_rng([list(_DRAWN).index(self._recipe), index]))


def draw(background: str, things: Sequence[Thing], size: tuple[int, int]) -> bytes:
    """Returns a PNG of `size` = (width, height) with `things` on a plain background."""
    width, height = size
    image = PILImage.new("RGB", size, COLOURS[background])
    canvas = ImageDraw.Draw(image)
    radius = 0.2 * min(size)
    for colour, shape, place in things:
        x, y = PLACES[place][0] * width, PLACES[place][1] * height
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            canvas.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle(box, fill=COLOURS[colour])
        elif shape == "bar":
            canvas.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=COLOURS[colour])
        else:
            corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
            canvas.polygon(corners, fill=COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _size(rng: np.random.Generator) -> tuple[int, int]:
    return _pick(rng, SIDES), _pick(rng, SIDES)


def _scene(rng: np.random.Generator, count: int) -> tuple[str, list[Thing]]:
    """Returns a background and `count` things, no two in one place and none in the colour of the background."""
    background, *colours = rng.permutation(list(COLOURS))[: count + 1].tolist()
    places = rng.permutation(list(PLACES))[:count].tolist()
    return background, [(colour, _pick(rng, SHAPES), place) for colour, place in zip(colours, places, strict=True)]


def _describe(thing: Thing) -> str:
    colour, shape, place = thing
    return f"a {colour} {shape} in the middle" if place == "middle" else f"a {colour} {shape} at the {place}"


def _t2i(rng: np.random.Generator) -> dict[str, Any]:
    background, things = _scene(rng, int(rng.integers(1, 3)))
    short = " and ".join(_describe(thing) for thing in things)
    captions = {"short": short, "long": f"On a plain {background} background there is {short}."}
    return {"image": draw(background, things, _size(rng)), "captions": json.dumps(captions)}


def _edit(rng: np.random.Generator) -> dict[str, Any]:
    background, (thing, *later) = _scene(rng, int(rng.integers(2, 4)))
    size, things = _size(rng), [thing]
    images, wordings = [draw(background, things, size)], []
    for added in later:
        things = [*things, added]
        images.append(draw(background, things, size))
        wordings.append([f"Add {_describe(added)}.", f"Draw {_describe(added)} too"])
    return {"image_list": images, "instruction_list": wordings}


def _vlm(rng: np.random.Generator) -> dict[str, Any]:
    background, things = _scene(rng, 1)
    colour, shape, place = things[0]
    turns = [
        (f"<image>\nWhich colour has the {shape}?", f"It is {colour}."),
        ("What is behind it?", f"A plain {background} background."),
        ("Where is it?", f"In the {place}." if place == "middle" else f"At the {place}."),
    ][: int(rng.integers(1, 4))]
    said = [{"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"images": [draw(background, things, _size(rng))], "conversations": said}


def _tutorial(rng: np.random.Generator) -> dict[str, Any]:
    background, things = _scene(rng, int(rng.integers(2, 5)))
    size = _size(rng)
    images = [draw(background, things[: k + 1], size) for k in range(len(things))]
    plan = ", ".join(f"Step{k}: draw {_describe(thing)}" for k, thing in enumerate(things, 1))
    prompt = f"How to draw {len(things)} shapes on {background} paper"
    return {"image_list": images, "instruction_list": [prompt, plan]}


def _composition(rng: np.random.Generator) -> dict[str, Any]:
    background, (first, second) = _scene(rng, 2)
    images = [draw(background, things, _size(rng)) for things in ([first], [second], [first, second])]
    text = f"Put the {first[1]} of <image 1> and the {second[1]} of <image 2> on one {background} sheet."
    return {"image_list": images, "instruction_list": [text]}


def _decomposition(rng: np.random.Generator) -> dict[str, Any]:
    background, things = _scene(rng, int(rng.integers(2, 5)))
    size = _size(rng)
    images = [draw(background, shown, size) for shown in (things, *([thing] for thing in things))]
    plan = ", ".join(f"Step{k}: {_describe(thing)}" for k, thing in enumerate(things, 1))
    return {"image_list": images, "instruction_list": ["Show each shape alone", plan]}


def _style(rng: np.random.Generator) -> dict[str, Any]:
    paper, (thing,) = _scene(rng, 1)
    other, (sample,) = _scene(rng, 1)
    colour = thing[0] if thing[0] != other else sample[0]
    images = [
        draw(paper, [thing], _size(rng)),
        draw(other, [sample], _size(rng)),
        draw(other, [(colour, *thing[1:])], _size(rng)),
    ]
    return {"image_list": images, "instruction_list": ["Put the shape of <original_image> on the paper of <style>."]}


_DRAWN = {
    "t2i": _t2i,
    "edit": _edit,
    "vlm": _vlm,
    "tutorial": _tutorial,
    "composition": _composition,
    "image_tutorial": _tutorial,
    "decomposition": _decomposition,
    "style": _style,
}
