"""Suites: held-out requests of the tutorial world, put to whatever makes interleaved sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ConfigError
from loom_jax.data.world import HELD_OUT_SPLITS, SIDE, SPLITS, TASKS, Example, Split, WorldTask, draw_example, render
from loom_jax.document import HistoryPolicy, InterleavedTask, Method, to_rgb
from loom_jax.evaluate.metrics import Outcome
from loom_jax.generate import Event, FrameMade, InterleavedRequest, PlanWritten, RequestFailed

Make = Callable[[Sequence[InterleavedRequest]], Iterable[Event]]
"""Makes the sequences of some requests, such as `lambda requests: interleave(generator, requests)`."""
OnDone = Callable[[int, int], None]
"""(requests done, of so many)"""

GENERATED_AS: dict[WorldTask, InterleavedTask] = {
    "tutorial": "tutorial",
    "image_tutorial": "tutorial",
    "composition": "compose",
    "decomposition": "decompose",
    "style": "style",
}
"""Task of the world -> task of a request."""


@dataclasses.dataclass(frozen=True)
class WorldSuite:
    """Requests of the tutorial world with exact truth; the same settings give the same requests, numbered alike.

    Attributes:
      tasks, splits: which; `test` and `long` hold combinations that training never shows.
      count: requests of each task and split.
      seed: of the examples, other than that of training.
      plan: whether the model writes the plan, or is given the right one.
      history: which earlier frames a frame sees; by default each task's own.
      method: parts of Loom's method that the model was trained with. Without planning it is told how many frames there
        are to be.

    Raises:
      ConfigError: a task, a split or a number is not possible.
    """

    tasks: tuple[WorldTask, ...] = TASKS
    splits: tuple[Split, ...] = HELD_OUT_SPLITS
    count: int = 50
    seed: int = 1000
    plan: Literal["written", "given"] = "written"
    history: HistoryPolicy | None = None
    method: Method = Method()

    def __post_init__(self) -> None:
        for kind, given, known in (("task", self.tasks, TASKS), ("split", self.splits, SPLITS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ConfigError(f"no {kind} {unknown[0] if unknown else 'given'!r}: choose from {', '.join(known)}")
        if self.count < 1 or self.seed < 0:
            raise ConfigError(f"count={self.count} must be at least 1, seed={self.seed} at least 0")

    def examples(self) -> list[Outcome]:
        """Returns every request as an outcome of which nothing is made yet."""
        drawn = [(split, task, index) for split in self.splits for task in self.tasks for index in range(self.count)]
        return [
            Outcome(self._number(split, task, index), split, draw_example(task, split, self.seed, index))
            for split, task, index in drawn
        ]

    def _number(self, split: Split, task: WorldTask, index: int) -> int:
        """A number that does not depend on which other tasks and splits there are."""
        return (index * len(SPLITS) + SPLITS.index(split)) * len(TASKS) + TASKS.index(task)

    def request(self, outcome: Outcome) -> InterleavedRequest:
        """Returns the request of an example; its seed is the number of the example."""
        example = outcome.example
        entities = tuple(token for token, _ in example.conditions)
        given = self.plan == "given" and self.method.planning
        return InterleavedRequest(
            instruction=example.instruction,
            task=GENERATED_AS[example.task],
            images=tuple(condition_pictures(example)),
            entities=entities if any(entities) else None,
            plan=example.plan if example.steps and given else None,
            num_steps=len(example.steps) if example.steps and not self.method.planning else None,
            size=(SIDE, SIDE),
            seed=outcome.number,
            history=self.history if example.steps else None,
            method=self.method,
        )


def condition_pictures(example: Example) -> list[PILImage.Image]:
    """Returns the pictures that are given."""
    scenes = [scene for _, scene in example.conditions]
    return [PILImage.fromarray(picture) for picture in render(scenes)] if scenes else []


def run_suite(suite: WorldSuite, make: Make, batch: int = 16, on_done: OnDone | None = None) -> list[Outcome]:
    """Returns what `make` makes of every request of a suite, in order.

    Args:
      suite: the requests.
      make: yields events as `loom_jax.generate.interleave` does; requests are numbered within the call.
      batch: requests of one call at most; a call holds requests of one task and split.
      on_done: is told of progress.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}: must be at least 1")
    waiting = suite.examples()
    out: list[Outcome] = []
    for begin in range(0, len(waiting), suite.count):
        group = waiting[begin : begin + suite.count]
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            out += collect(part, make([suite.request(outcome) for outcome in part]))
            if on_done is not None:
                on_done(len(out), len(waiting))
    return out


def collect(outcomes: Sequence[Outcome], events: Iterable[Event]) -> list[Outcome]:
    """Returns outcomes with what events bring to each."""
    made = list(outcomes)
    for event in events:
        if isinstance(event, PlanWritten):
            made[event.request] = dataclasses.replace(made[event.request], steps=event.steps)
        elif isinstance(event, FrameMade):
            outcome = made[event.request]
            frames = (*outcome.frames, np.asarray(to_rgb(event.image)))
            made[event.request] = dataclasses.replace(outcome, frames=frames, seconds=(*outcome.seconds, event.seconds))
        elif isinstance(event, RequestFailed):
            made[event.request] = dataclasses.replace(made[event.request], failure=event.reason)
    return made
