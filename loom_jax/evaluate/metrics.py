"""Metrics of the tutorial world, from (what was asked, what is right, what was made); nothing here judges by taste."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from loom_jax.core import InputError
from loom_jax.data.world import (
    PLACES,
    SIDE,
    Example,
    Paint,
    Reading,
    Scene,
    Split,
    Step,
    follow,
    read_pictures,
    read_step,
    touched,
)
from loom_jax.evaluate.intervals import Interval, estimate

METRICS = {
    "plan": "the plan has just the right steps, in the right order",
    "plan_step": "the step of the plan at this turn is right",
    "step": "the frame shows just what it should after this step; frames too many are seen by `sequence` alone",
    "followed": "the frame shows what the plan that was written asks for, up to the first step that cannot be followed",
    "sequence": "every frame of the request is right, and there are as many as there should be",
    "f1": "things that are shown against things that should be: harmonic mean of precision and recall",
    "place": "a thing stands where one should be",
    "colour": "the thing where one should be has the right colour",
    "shape": "the thing where one should be has the right shape",
    "background": "the background is right",
    "style": "the style is right",
    "consistency": "what the step should not change is as it was in the frame before, or in the picture given; 0 where "
    "one of the two is missing or shows nothing of this world",
    "clear": "the frame shows something of this world at all",
}
"""What is measured, each from 0 to 1. `plan` and `sequence` are of a request, the others of a frame. A frame that is
missing, or shows nothing of this world, is wrong in everything."""
KIND_METRICS = ("plan_step", "step")
"""Those that are told apart by what a step does, and by style."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
      number: of the request; two runs of one suite number alike.
      split, example: what was asked, and what is right.
      steps: texts of the plan that was written or given; none for tasks without one.
      frames: made pictures, uint8 [64, 64, 3], in order of their turns.
      seconds: that the frames took, each.
      failure: why the request failed, if it did.
    """

    number: int
    split: Split
    example: Example
    steps: tuple[str, ...] = ()
    frames: tuple[np.ndarray, ...] = ()
    seconds: tuple[float, ...] = ()
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One value of one metric.

    Attributes:
      turn: counts from 1; None where the metric is of the whole request.
      kind: what the turn is about: `paint`, `add`, `recolour`, `move` or `remove`, or of a style its name; else None.
    """

    number: int
    split: Split
    task: str
    metric: str
    turn: int | None
    value: float
    kind: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over the requests of one split and task; `turn` and `kind` are None for all of them together."""

    split: Split
    task: str
    metric: str
    turn: int | None
    interval: Interval
    kind: str | None = None


def measure(outcomes: Sequence[Outcome]) -> list[Measurement]:
    """Returns every metric of every outcome. What was not made counts as wrong.

    Raises:
      InputError: a frame is not 64 x 64.
    """
    frames = [frame for outcome in outcomes for frame in outcome.frames]
    for frame in frames:
        if frame.shape != (SIDE, SIDE, 3):
            raise InputError(f"a frame is {frame.shape}: this world is read from pictures of {SIDE} x {SIDE} pixels")
    readings = iter(read_pictures(np.stack(frames)) if frames else [])
    out: list[Measurement] = []
    for outcome in outcomes:
        own = [next(readings) for _ in outcome.frames]
        of = (outcome.number, outcome.split, outcome.example.task)
        for metric, turn, value in _measure_request(outcome, own):
            out.append(Measurement(*of, metric, turn, float(value), _kind(outcome.example, turn)))
    return out


def _kind(example: Example, turn: int | None) -> str | None:
    if turn is None or turn > len(example.frames):
        return None
    if example.task == "style":
        return example.frames[turn - 1].style
    return type(example.steps[turn - 1]).__name__.lower() if example.steps else None


def summarise(measurements: Sequence[Measurement], confidence: float = 0.95) -> list[Score]:
    """Returns the mean of each metric for each split and task, over all turns and for each turn."""
    groups: dict[tuple[Split, str, str, int | None], dict[Hashable, list[float]]] = {}
    for m in measurements:
        for turn in dict.fromkeys((None, m.turn)):
            groups.setdefault((m.split, m.task, m.metric, turn), {}).setdefault(m.number, []).append(m.value)
    return [
        Score(split, task, metric, turn, estimate(values, confidence))
        for (split, task, metric, turn), values in groups.items()
    ]


def summarise_kinds(measurements: Sequence[Measurement], confidence: float = 0.95) -> list[Score]:
    """Returns the means of KIND_METRICS for each split, task and kind of step or style."""
    groups: dict[tuple[Split, str, str, str], dict[Hashable, list[float]]] = {}
    for m in measurements:
        if m.kind is not None and m.metric in KIND_METRICS:
            groups.setdefault((m.split, m.task, m.metric, m.kind), {}).setdefault(m.number, []).append(m.value)
    return [
        Score(split, task, metric, None, estimate(values, confidence), kind)
        for (split, task, metric, kind), values in sorted(groups.items())
    ]


def values_of(
    measurements: Iterable[Measurement], metric: str, split: Split | None = None, task: str | None = None
) -> dict[int, list[float]]:
    """Returns the values of a metric by request, as `paired_difference` takes them."""
    out: dict[int, list[float]] = {}
    for m in measurements:
        if m.metric == metric and split in (None, m.split) and task in (None, m.task):
            out.setdefault(m.number, []).append(m.value)
    return out


def read_plan(texts: Sequence[str]) -> list[Step | None]:
    """Returns the steps of a plan; None for a step that this world does not know."""
    out: list[Step | None] = []
    for text in texts:
        try:
            out.append(read_step(text))
        except InputError:
            out.append(None)
    return out


def _measure_request(outcome: Outcome, readings: Sequence[Reading]) -> Iterator[tuple[str, int | None, float]]:
    example, expected = outcome.example, outcome.example.frames
    written = read_plan(outcome.steps)
    if example.steps:
        yield "plan", None, written == list(example.steps)
        for turn, step in enumerate(example.steps, 1):
            yield "plan_step", turn, turn <= len(written) and written[turn - 1] == step
    right = [shows(reading, scene) for reading, scene in zip(readings, expected, strict=False)]
    yield "sequence", None, len(readings) == len(expected) and all(right)
    for turn, scene in enumerate(expected, 1):
        shown = _shown(readings, turn)
        yield "step", turn, shown == scene
        yield "clear", turn, shown is not None
        for metric, value in _compare(scene, shown):
            yield metric, turn, value
    for turn, scene in enumerate(_followed(example, written), 1):
        yield "followed", turn, _shown(readings, turn) == scene
    yield from _consistency(example, written, readings)


def shows(reading: Reading, scene: Scene) -> bool:
    """Returns whether a picture clearly shows a scene, just that and in its style."""
    return reading.clear and reading.scene == scene


def _shown(readings: Sequence[Reading], turn: int) -> Scene | None:
    """Returns what the frame of a turn shows; None where it is missing, or shows nothing of this world."""
    reading = readings[turn - 1] if turn <= len(readings) else None
    return reading.scene if reading is not None and reading.clear else None


def f1(shown: Scene, expected: Scene) -> float:
    """Returns the harmonic mean of precision and recall of things; a thing counts if all of it is right."""
    total = len(shown.things) + len(expected.things)
    return 2 * len(shown.things & expected.things) / total if total else 1.0


def _compare(expected: Scene, shown: Scene | None) -> Iterator[tuple[str, float]]:
    """Compares a frame with what it should show; no frame is wrong in everything."""
    yield "f1", 0.0 if shown is None else f1(shown, expected)
    yield "background", shown is not None and shown.background == expected.background
    yield "style", shown is not None and shown.style == expected.style
    for thing in expected.in_order:
        found = None if shown is None else shown.at(thing.place)
        yield "place", found is not None
        yield "colour", found is not None and found.colour == thing.colour
        yield "shape", found is not None and found.shape == thing.shape


def _followed(example: Example, written: Sequence[Step | None]) -> list[Scene]:
    """Returns what the frames show if the written plan is followed; nothing from the first step that cannot be."""
    known: list[Step] = []
    scenes: list[Scene] = []
    for step in written:
        if step is None:
            break
        known.append(step)
        try:
            scenes = follow(known, elements=example.task == "decomposition")
        except InputError:
            break
    return scenes


def _consistency(
    example: Example, written: Sequence[Step | None], readings: Sequence[Reading]
) -> Iterator[tuple[str, int, float]]:
    """Compares each frame with the one before it, or with the picture given, where the step changes nothing."""
    if example.base is not None:
        yield "consistency", 1, _kept(example.base, example.frames[0], _shown(readings, 1))
    if example.task not in ("tutorial", "image_tutorial"):
        return
    for turn in range(2, len(example.steps) + 1):
        step = (written[turn - 1] if turn <= len(written) else None) or example.steps[turn - 1]
        yield "consistency", turn, _unchanged(step, _shown(readings, turn - 1), _shown(readings, turn))


def _kept(given: Scene, expected: Scene, shown: Scene | None) -> float:
    """Returns the share of what should be as in the picture given, that is."""
    if shown is None:
        return 0.0
    kept: list[bool] = [thing in shown.things for thing in given.in_order]
    kept += [shown.background == given.background] if expected.background == given.background else []
    kept += [shown.style == given.style] if expected.style == given.style else []
    return sum(kept) / len(kept)


def _unchanged(step: Step, before: Scene | None, after: Scene | None) -> float:
    """Returns the share of what a step does not touch, that is as in the frame before."""
    if before is None or after is None:
        return 0.0
    same = [before.at(place) == after.at(place) for place in PLACES if place not in touched(step)]
    same.append(before.style == after.style)
    if not isinstance(step, Paint):
        same.append(before.background == after.background)
    return sum(same) / len(same)
