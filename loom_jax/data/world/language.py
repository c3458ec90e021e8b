"""What is said in the tutorial world: steps in one wording, which can be read back, and instructions in many."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from loom_jax.core import InputError
from loom_jax.data.world.scene import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    PAPER,
    PLACES,
    ROWS,
    SHAPES,
    SIZES,
    Add,
    Move,
    Paint,
    Recolour,
    Remove,
    Step,
    Thing,
)

STEPS = {
    Paint: "paint the {ground}",
    Add: "draw a {size} {colour} {shape} {at}",
    Recolour: "make the {size} {colour} {shape} {at} {new}",
    Move: "move the {size} {colour} {shape} from {where} to {there}",
    Remove: "erase the {size} {colour} {shape} {at}",
}
"""How the steps of a tutorial are worded."""
ELEMENTS = {Paint: "the {ground}", Add: "the {size} {colour} {shape} {at}"}
"""How the elements of a decomposition are."""

SIZE_WORDS = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus")}
GROUND_WORDS = {
    "paper": ("plain paper", "an empty sheet"),
    "meadow": ("a meadow", "the green meadow"),
    "beach": ("a beach", "the sandy beach"),
    "sky": ("the sky", "a cloudy sky"),
    "sea": ("the sea", "a calm sea"),
    "dusk": ("the dusk", "a pink dusk"),
}

TUTORIALS = (
    "Draw {things} on {ground}.",
    "Show me how to draw {things} on {ground}.",
    "How do I draw {things} on {ground}?",
    "I would like a picture of {ground} with {things}.",
    "On {ground}, draw {things}.",
    "Paint {ground}, and on it {things}.",
    "Please draw {ground} with {things}.",
    "A picture with {things} on {ground}, please.",
)
CHANGES = {
    Recolour: ("Then make the {colour} {shape} {new}.", "After that, colour the {colour} {shape} {new}."),
    Move: ("Then move the {colour} {shape} to {there}.", "After that, the {colour} {shape} goes to {there}."),
    Remove: ("Then take the {colour} {shape} away.", "After that, erase the {colour} {shape}."),
}
IMAGE_TUTORIALS = (
    "Show me how to draw this picture.",
    "How was this picture made?",
    "Draw this step by step.",
    "I would like to paint the same picture. How do I do it?",
    "Explain how to get to this picture.",
)
DECOMPOSITIONS = (
    "Take this picture apart.",
    "Show me every part of this picture alone.",
    "What is this picture made of?",
    "Split the picture into its things.",
    "Please show all parts, one by one.",
)
STYLINGS = (
    "Draw <original_image> in the style of <style>.",
    "Give <original_image> the look of <style>.",
    "Use the style of <style> for <original_image>.",
    "Make <original_image> look like <style>.",
    "I would like <original_image> to have the style of <style>.",
)
PLACINGS = (
    "Put the thing of {thing} {at} of {scene}.",
    "Take {scene} and add the thing of {thing} {at}.",
    "Draw {scene} with the thing of {thing} {at}.",
    "I would like {thing} {at} of {scene}.",
)
MERGINGS = (
    "Put the things of <image 1> and <image 2> on {ground}.",
    "Show <image 1> and <image 2> together on {ground}.",
    "On {ground}, join what is in <image 1> and <image 2>.",
)
GROUNDINGS = (
    "Put the things of <image 1> on the background of <image 2>.",
    "Take the background of <image 2> and the things of <image 1>.",
    "Give the things of <image 1> the background of <image 2>.",
)
DRESSINGS = (
    "Give <model> the thing of <upper> above and the thing of <lower> below.",
    "Put <upper> at the top and <lower> at the bottom of <model>.",
    "Dress <model>: <upper> above, <lower> below.",
)

_WORDS = {word: size for size, words in SIZE_WORDS.items() for word in words}
_WORDS |= {word: shape for shape, words in SHAPE_WORDS.items() for word in words}


def at(place: str) -> str:
    """Returns where a thing is: `at the top far left`."""
    return f"at the {place}"


def word_step(step: Step, element: bool = False) -> str:
    """Returns the text of a step; of an element of a decomposition, if `element`."""
    wording = (ELEMENTS if element else STEPS)[type(step)]
    if isinstance(step, Paint):
        return wording.format(ground=step.background)
    thing = step.thing
    parts = {"size": thing.size, "colour": thing.colour, "shape": thing.shape, "at": at(thing.place)}
    if isinstance(step, Recolour):
        parts["new"] = step.colour
    elif isinstance(step, Move):
        parts |= {"where": f"the {thing.place}", "there": f"the {step.place}"}
    return wording.format(**parts)


def read_step(text: str) -> Step:
    """Returns the step that a text asks for, in the wording of `word_step`, with or without its synonyms.

    Raises:
      InputError: it is worded in another way, or names what this world has not.
    """
    plain = " ".join(_WORDS.get(word, word) for word in text.strip(" \t\n.,").split())
    for pattern, kind in _PATTERNS:
        match = pattern.fullmatch(plain)
        if match:
            found = match.groupdict()
            return _make_step(kind, found)
    raise InputError(f"{text!r} is no step of this world: expected, for example, {STEPS[Add]!r}")


def _make_step(kind: type[Step], found: dict[str, str]) -> Step:
    if kind is Paint:
        return Paint(found["ground"])
    thing = Thing(found["size"], found["colour"], found["shape"], found["place"])
    if kind is Recolour:
        return Recolour(thing, found["new"])
    if kind is Move:
        return Move(thing, found["there"])
    return Remove(thing) if kind is Remove else Add(thing)


def _compile(wording: str) -> re.Pattern[str]:
    def one_of(name: str, words: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    slots = {
        "size": one_of("size", SIZES),
        "colour": one_of("colour", COLOURS),
        "shape": one_of("shape", SHAPES),
        "ground": one_of("ground", BACKGROUNDS),
        "new": one_of("new", COLOURS),
        "at": f"at the {one_of('place', PLACES)}",
        "where": f"the {one_of('place', PLACES)}",
        "there": f"the {one_of('there', PLACES)}",
    }
    return re.compile(wording.format(**slots))


_PATTERNS = [(_compile(wording), kind) for wordings in (STEPS, ELEMENTS) for kind, wording in wordings.items()]


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """Returns one of the values, drawn evenly."""
    return values[int(rng.integers(len(values)))]


def describe(thing: Thing, rng: np.random.Generator) -> str:
    """Returns a thing in one of its wordings: `a little red disc at the top left`."""
    size, shape = pick(rng, SIZE_WORDS[thing.size]), pick(rng, SHAPE_WORDS.get(thing.shape, (thing.shape,)))
    return f"a {size} {thing.colour} {shape} {_at(thing.place, rng)}"


def ground(background: str, rng: np.random.Generator) -> str:
    """Returns a background in one of its wordings."""
    return pick(rng, GROUND_WORDS[background])


def _at(place: str, rng: np.random.Generator) -> str:
    return pick(rng, _at_words(place))


def _at_words(place: str) -> tuple[str, ...]:
    row, column = place.split(" ", 1)
    return at(place), f"in the {row} row on the {column}"


def word_tutorial(background: str, things: Sequence[Thing], changes: Sequence[Step], rng: np.random.Generator) -> str:
    """Returns the instruction of a tutorial: things in any order, and then what is to be changed, in order."""
    told = [describe(things[int(i)], rng) for i in rng.permutation(len(things))]
    listed = told[0] if len(told) == 1 else ", ".join(told[:-1]) + " and " + told[-1]
    sentences = [pick(rng, TUTORIALS).format(things=listed, ground=ground(background, rng))]
    for change in changes:
        assert not isinstance(change, Paint)
        words = {"colour": change.thing.colour, "shape": change.thing.shape}
        if isinstance(change, Recolour):
            words["new"] = change.colour
        elif isinstance(change, Move):
            words["there"] = f"the {change.place}"
        sentences.append(pick(rng, CHANGES[type(change)]).format(**words))
    return " ".join(sentences)


def word_placing(thing: str, scene: str, place: str, rng: np.random.Generator) -> str:
    """Returns the instruction to put the thing of one picture somewhere in another; they are named by their tokens."""
    return pick(rng, PLACINGS).format(thing=thing, scene=scene, at=_at(place, rng))


def phrases() -> list[str]:
    """Returns every wording there is, slots left open as `{}`, and everything that can stand in one."""
    groups: list[Sequence[str]] = [TUTORIALS, IMAGE_TUTORIALS, DECOMPOSITIONS, STYLINGS, PLACINGS, MERGINGS]
    groups += [GROUNDINGS, DRESSINGS, *CHANGES.values(), list(STEPS.values()), list(ELEMENTS.values())]
    wordings = [re.sub(r"\{\w+\}", "{}", text) for group in groups for text in group]
    words: list[str] = [*SHAPES, *COLOURS, *SIZES, *PLACES, *ROWS, *COLUMNS, *BACKGROUNDS, PAPER, "a", "and"]
    for synonyms in (*SIZE_WORDS.values(), *SHAPE_WORDS.values(), *GROUND_WORDS.values(), *map(_at_words, PLACES)):
        words += synonyms
    return [*wordings, *words]
