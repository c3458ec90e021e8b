"""The tutorial world: scenes of simple things on a grid of sixteen places, and the steps that change them.

A scene is a background and at most one thing a place; a picture shows a scene in a style. Some combinations of shape,
colour and place are held out: no picture of the training split ever shows one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from loom_jax.core import InputError

Split = Literal["train", "test", "long", "train_long"]
SPLITS: tuple[Split, ...] = ("train", "test", "long", "train_long")
HELD_OUT_SPLITS: tuple[Split, ...] = ("test", "long")
"""Those that show combinations that are held out. `long` is longer than `train`; `train_long` is as long, for plans."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("large", "small")
"""In the order in which a plan draws them."""
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("far left", "left", "right", "far right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
"""In reading order, four a row; the order in which a plan draws things of one size."""
PAPER = "paper"
"""The background of an empty sheet."""
BACKGROUNDS = (PAPER, "meadow", "beach", "sky", "sea", "dusk")
STYLES = ("plain", "pastel", "outline", "stripes", "night")


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """A thing in a scene."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts things as a plan draws them: large before small, then by place."""
        return SIZES.index(self.size), PLACES.index(self.place)

    @property
    def held_out(self) -> bool:
        """Whether the combination of shape, colour and place is kept from training.

        A sixth of them are, so spread that each two of the three still occur together in training.
        """
        parts = SHAPES.index(self.shape), COLOURS.index(self.colour), PLACES.index(self.place)
        return sum(parts) % len(COLOURS) == 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows. Scenes of the same things are equal, in whatever order they came."""

    background: str = PAPER
    things: frozenset[Thing] = frozenset()
    style: str = STYLES[0]

    @property
    def in_order(self) -> list[Thing]:
        """The things as a plan draws them."""
        return sorted(self.things, key=lambda thing: thing.rank)

    def at(self, place: str) -> Thing | None:
        """Returns the thing at a place, if one is there."""
        return next((thing for thing in self.things if thing.place == place), None)

    @property
    def free(self) -> list[str]:
        """Places where nothing is."""
        return [place for place in PLACES if self.at(place) is None]


@dataclasses.dataclass(frozen=True)
class Paint:
    """Gives the scene a background."""

    background: str


@dataclasses.dataclass(frozen=True)
class Add:
    """Puts a thing where none is."""

    thing: Thing


@dataclasses.dataclass(frozen=True)
class Recolour:
    """Gives a thing another colour."""

    thing: Thing
    colour: str


@dataclasses.dataclass(frozen=True)
class Move:
    """Takes a thing to a free place."""

    thing: Thing
    place: str


@dataclasses.dataclass(frozen=True)
class Remove:
    """Takes a thing away."""

    thing: Thing


Step = Paint | Add | Recolour | Move | Remove


def apply(scene: Scene, step: Step) -> Scene:
    """Returns the scene after a step.

    Raises:
      InputError: the step asks for a thing that is not there, or for a place that is taken.
    """
    if isinstance(step, Paint):
        return dataclasses.replace(scene, background=step.background)
    if isinstance(step, Add):
        return dataclasses.replace(scene, things=scene.things | {_into_free(scene, step.thing)})
    if step.thing not in scene.things:
        raise InputError(f"{step}: there is no such thing among {scene.in_order}")
    rest = scene.things - {step.thing}
    if isinstance(step, Recolour):
        rest |= {dataclasses.replace(step.thing, colour=step.colour)}
    elif isinstance(step, Move):
        rest |= {_into_free(scene, dataclasses.replace(step.thing, place=step.place))}
    return dataclasses.replace(scene, things=rest)


def touched(step: Step) -> set[str]:
    """Returns the places that a step changes; none where it changes the background."""
    if isinstance(step, Paint):
        return set()
    return {step.thing.place} | ({step.place} if isinstance(step, Move) else set())


def _into_free(scene: Scene, thing: Thing) -> Thing:
    if scene.at(thing.place) is not None:
        raise InputError(f"{thing}: the place is taken by {scene.at(thing.place)}")
    return thing
