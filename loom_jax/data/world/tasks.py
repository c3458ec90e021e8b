"""Draws examples of the five tasks: what is asked, what is shown, and every picture that is to come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from loom_jax.core import InputError
from loom_jax.data.world import language
from loom_jax.data.world.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SPLITS,
    PAPER,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    STYLES,
    Add,
    Move,
    Paint,
    Recolour,
    Remove,
    Scene,
    Split,
    Step,
    Thing,
    apply,
)

WorldTask = Literal["tutorial", "image_tutorial", "composition", "decomposition", "style"]
TASKS: tuple[WorldTask, ...] = ("tutorial", "image_tutorial", "composition", "decomposition", "style")

TURNS: dict[Split, tuple[int, int]] = {"train": (2, 4), "test": (2, 4), "long": (5, 6), "train_long": (2, 6)}
"""Fewest and most frames of a tutorial."""
ELEMENTS: dict[Split, tuple[int, int]] = {"train": (2, 6), "test": (2, 4), "long": (5, 6), "train_long": (2, 6)}
"""Of a decomposition: in training as long as anywhere, so that every time token is learned."""
THINGS: dict[Split, tuple[int, int]] = {"train": (1, 3), "test": (1, 3), "long": (4, 5), "train_long": (1, 5)}
"""Things in the picture that a composition or a style begins with."""
ABOVE, BELOW = "top left", "bottom left"
"""Where the things go that dress a picture."""
HELD_OUT = 0.6
"""Chance of a thing outside training to be a held-out combination; one in each example is for certain."""
_GROUNDS = tuple(name for name in BACKGROUNDS if name != PAPER)


@dataclasses.dataclass(frozen=True)
class Example:
    """A request with everything that a right answer shows.

    Attributes:
      task: which of the five.
      instruction: what is asked.
      conditions: pictures that are given, each with the entity token of its role, if it has one.
      steps: of a tutorial, or elements of a decomposition; none for the tasks with one picture.
      frames: what each picture to be made shows.
      base: the given picture whose things the answer keeps, if there is one.
    """

    task: WorldTask
    instruction: str
    conditions: tuple[tuple[str | None, Scene], ...]
    steps: tuple[Step, ...]
    frames: tuple[Scene, ...]
    base: Scene | None = None

    @property
    def plan(self) -> tuple[str, ...]:
        """Texts of the steps."""
        return tuple(language.word_step(step, element=self.task == "decomposition") for step in self.steps)

    @property
    def scenes(self) -> list[Scene]:
        """Everything that is shown or to be shown."""
        return [*(scene for _, scene in self.conditions), *self.frames]


def draw_example(task: WorldTask, split: Split, seed: int, index: int) -> Example:
    """Returns an example; the same arguments give the same one.

    Examples of `train` and `train_long` show no held-out combination; those of `test` and `long` show at least one
    among the pictures to be made. Those of `long` are longer, or fuller, than those of `train` and `test`.

    Raises:
      InputError: there is no such task or split.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r} of the world: there are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of the world: there are {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, TASKS.index(task), SPLITS.index(split), index])
    while True:
        example = _DRAW[task](rng, split)
        held_out = [any(thing.held_out for thing in scene.things) for scene in example.scenes]
        if any(held_out[len(example.conditions) :]) if split in HELD_OUT_SPLITS else not any(held_out):
            return example


def follow(steps: Sequence[Step], elements: bool = False) -> list[Scene]:
    """Returns what each frame shows if the steps are followed from an empty sheet; `elements`: each step alone.

    Raises:
      InputError: a step cannot be done.
    """
    scenes, scene = [], Scene()
    for step in steps:
        scene = apply(Scene() if elements else scene, step)
        scenes.append(scene)
    return scenes


def in_order(scene: Scene) -> tuple[Step, ...]:
    """Returns the steps that make a scene by the rule of this world: the background, large things before small ones,
    and those of one size by their place."""
    return (Paint(scene.background), *(Add(thing) for thing in scene.in_order))


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _thing(rng: np.random.Generator, split: Split, place: str, others: Sequence[Thing]) -> Thing:
    """Draws a thing for a place; no two things of a scene share both colour and shape, so that these name them."""
    wants_held_out = split in HELD_OUT_SPLITS and rng.random() < HELD_OUT
    taken = {(thing.colour, thing.shape) for thing in others}
    while True:
        colour, shape = language.pick(rng, tuple(COLOURS)), language.pick(rng, SHAPES)
        thing = Thing(language.pick(rng, SIZES), colour, shape, place)
        if thing.held_out == wants_held_out and (colour, shape) not in taken:
            return thing


def _things(
    rng: np.random.Generator, split: Split, count: int, places: Sequence[str] = PLACES, others: Sequence[Thing] = ()
) -> list[Thing]:
    """Draws things in places of their own."""
    out: list[Thing] = []
    for i in rng.permutation(len(places))[:count]:
        out.append(_thing(rng, split, places[int(i)], [*others, *out]))
    return out


def _scene(rng: np.random.Generator, split: Split, count: int, grounds: Sequence[str] = _GROUNDS) -> Scene:
    return Scene(language.pick(rng, grounds), frozenset(_things(rng, split, count)))


def _shuffled(rng: np.random.Generator, *conditions: tuple[str, Scene]) -> tuple[tuple[str | None, Scene], ...]:
    """Puts the pictures in any order, so that only the tokens tell their roles."""
    return tuple(conditions[int(i)] for i in rng.permutation(len(conditions)))


def _change(rng: np.random.Generator, split: Split, scene: Scene, thing: Thing) -> Step:
    """Draws a change of a thing."""
    kind = rng.random()
    if kind < 0.2:
        return Remove(thing)
    if kind < 0.6 and scene.free:
        return Move(thing, language.pick(rng, scene.free))
    others = [(other.colour, other.shape) for other in scene.things]
    colours = [colour for colour in COLOURS if (colour, thing.shape) not in others]
    return Recolour(thing, language.pick(rng, colours)) if colours else Remove(thing)


def _tutorial(rng: np.random.Generator, split: Split) -> Example:
    turns = _between(rng, TURNS[split])
    most = min(2, (turns - 1) // 2)
    changes = int(rng.integers(0, most + 1))
    if split not in HELD_OUT_SPLITS:
        changes = max(changes, int(rng.integers(0, most + 1)))  # the hardest steps, and the rarest: train on more
    first = _scene(rng, split, turns - 1 - changes)
    changed = [first.in_order[int(i)] for i in rng.permutation(len(first.things))[:changes]]
    steps, scene = list(in_order(first)), first
    for thing in changed:
        steps.append(_change(rng, split, scene, thing))
        scene = apply(scene, steps[-1])
    instruction = language.word_tutorial(first.background, first.in_order, steps[turns - changes :], rng)
    return Example("tutorial", instruction, (), tuple(steps), tuple(follow(steps)))


def _image_tutorial(rng: np.random.Generator, split: Split) -> Example:
    scene = _scene(rng, split, _between(rng, TURNS[split]) - 1)
    steps = in_order(scene)
    instruction = language.pick(rng, language.IMAGE_TUTORIALS)
    return Example("image_tutorial", instruction, ((None, scene),), steps, tuple(follow(steps)))


def _decomposition(rng: np.random.Generator, split: Split) -> Example:
    scene = _scene(rng, split, _between(rng, ELEMENTS[split]) - 1)
    steps = in_order(scene)
    instruction = language.pick(rng, language.DECOMPOSITIONS)
    return Example("decomposition", instruction, ((None, scene),), steps, tuple(follow(steps, elements=True)))


def _style(rng: np.random.Generator, split: Split) -> Example:
    content = _scene(rng, split, _between(rng, THINGS[split]), BACKGROUNDS)
    style = language.pick(rng, STYLES[1:])
    sample = dataclasses.replace(_scene(rng, split, _between(rng, THINGS["train"]), BACKGROUNDS), style=style)
    conditions = _shuffled(rng, ("<original_image>", content), ("<style>", sample))
    target = dataclasses.replace(content, style=style)
    return Example("style", language.pick(rng, language.STYLINGS), conditions, (), (target,), base=content)


def _composition(rng: np.random.Generator, split: Split) -> Example:
    kinds = (_place, _place, _merge, _put_on_ground, _dress)
    return kinds[int(rng.integers(len(kinds)))](rng, split)


def _place(rng: np.random.Generator, split: Split) -> Example:
    """A thing from one picture, at a place that is named, in another."""
    scene = _scene(rng, split, _between(rng, THINGS[split]))
    place = language.pick(rng, scene.free)
    thing = _thing(rng, split, place, list(scene.things))
    shown = dataclasses.replace(thing, place=language.pick(rng, PLACES))
    tokens = ("<object>", "<original_image>") if rng.random() < 0.5 else ("<image 2>", "<image 1>")
    conditions = _shuffled(rng, (tokens[0], Scene(PAPER, frozenset({shown}))), (tokens[1], scene))
    target = apply(scene, Add(thing))
    text = language.word_placing(*tokens, place, rng)
    return Example("composition", text, conditions, (), (target,), base=scene)


def _merge(rng: np.random.Generator, split: Split) -> Example:
    """The things of two pictures, where they are, on a background that is named."""
    count = _between(rng, THINGS[split]) + 1
    things = _things(rng, split, count)
    cut = int(rng.integers(1, count))
    shown = [Scene(language.pick(rng, BACKGROUNDS), frozenset(part)) for part in (things[:cut], things[cut:])]
    background = language.pick(rng, _GROUNDS)
    text = language.pick(rng, language.MERGINGS).format(ground=language.ground(background, rng))
    conditions = _shuffled(rng, ("<image 1>", shown[0]), ("<image 2>", shown[1]))
    return Example("composition", text, conditions, (), (Scene(background, frozenset(things)),))


def _put_on_ground(rng: np.random.Generator, split: Split) -> Example:
    """The things of one picture on the background of another."""
    first, second = (_scene(rng, split, _between(rng, THINGS[s]), BACKGROUNDS) for s in (split, "train"))
    conditions = _shuffled(rng, ("<image 1>", first), ("<image 2>", second))
    target = dataclasses.replace(first, background=second.background)
    return Example("composition", language.pick(rng, language.GROUNDINGS), conditions, (), (target,), base=first)


def _dress(rng: np.random.Generator, split: Split) -> Example:
    """Two things, above and below in a picture that is free there."""
    places = [place for place in PLACES if place not in (ABOVE, BELOW)]
    things = _things(rng, split, _between(rng, THINGS[split]), places)
    model = Scene(language.pick(rng, _GROUNDS), frozenset(things))
    upper = _thing(rng, split, ABOVE, things)
    lower = _thing(rng, split, BELOW, [*things, upper])
    shown = [
        Scene(PAPER, frozenset({dataclasses.replace(thing, place=language.pick(rng, PLACES))}))
        for thing in (upper, lower)
    ]
    conditions = _shuffled(rng, ("<model>", model), ("<upper>", shown[0]), ("<lower>", shown[1]))
    target = apply(apply(model, Add(upper)), Add(lower))
    return Example("composition", language.pick(rng, language.DRESSINGS), conditions, (), (target,), base=model)


_DRAW: dict[WorldTask, Callable[[np.random.Generator, Split], Example]] = {
    "tutorial": _tutorial,
    "image_tutorial": _image_tutorial,
    "composition": _composition,
    "decomposition": _decomposition,
    "style": _style,
}
