"""Interleaved documents: the one place that spells Loom's prompts and orders its segments, for training and generation.

Source: spec of Loom, order of segments. A document is a prologue (condition images, prompt, plan) and then turns, one a
frame: time token, step text, and the frame in its roles. What is droppable is what the guidance branches leave out: all
texts (`no-text`) or all pictures (`no-image`); time and entity tokens always stay.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import InputError
from loom_jax.document.document import EncodedSegment, Picture, Role, Segment, Text, drop_segments
from loom_jax.document.tokenizer import Tokenizer

InterleavedTask = Literal["tutorial", "compose", "decompose", "style"]
Branch = Literal["cond", "no_text", "no_image"]

ENTITY_TOKENS = (
    "<image 1>",
    "<image 2>",
    "<original_image>",
    "<style>",
    "<model>",
    "<upper>",
    "<lower>",
    "<object>",
)
"""Tokens that name the role of a condition image. More can be added to a tokenizer and used alike."""

PLANNED: tuple[InterleavedTask, ...] = ("tutorial", "decompose")
"""Tasks whose frames follow a plan; the others make one picture."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Which parts of Loom's method a sequence is made with: all, unless one is left out to see what it does.

    Attributes:
      planning: the plan, and the text of its step before each frame; without it the instruction alone says what comes.
      time_tokens: a token before each frame that says which one it is.
      entity_tokens: a token before each condition picture that says what role it has.
    """

    planning: bool = True
    time_tokens: bool = True
    entity_tokens: bool = True


WHOLE = Method()

_PLAN_PROMPTS = {
    "tutorial": 'Write a tutorial with pictures: "{instruction}".{count} Answer: Step1: ..., Step2: ...',
    "decompose": 'Take the picture apart: "{instruction}".{count} Answer: Step1: ..., Step2: ...',
}


def plan_prompt(task: InterleavedTask, instruction: str, steps: int | None) -> str:
    """Returns the prompt of a planned task. `steps`: how many there are to be, None to leave it to the model."""
    count = "" if steps is None else f" It has {steps} {'step' if steps == 1 else 'steps'}."
    return _PLAN_PROMPTS[task].format(instruction=instruction, count=count)


def format_plan(steps: Sequence[str]) -> str:
    """Returns the text of a plan as the model writes it; `parse_steps` reads it again."""
    return ", ".join(f"Step{number}: {step}" for number, step in enumerate(steps, 1))


def time_token(turn: int) -> str:
    """Returns the token that says which place in the sequence a frame has; `turn` counts from 1."""
    return f"<|turn_{turn}|>"


def count_time_tokens(tokenizer: Tokenizer) -> int:
    """Returns how many turns a tokenizer has tokens for."""
    turn = 0
    while tokenizer.has_token(time_token(turn + 1)):
        turn += 1
    return turn


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture that a document shows, with its latents where they were computed beforehand (see `Picture`)."""

    image: PILImage.Image
    moments: np.ndarray | None = None

    def as_roles(self, *roles: Role, droppable: bool = False) -> list[Segment]:
        """Returns the picture as one segment for each role."""
        return [Picture(self.image, role, droppable, None if role == "vit" else self.moments) for role in roles]

    def as_condition(self) -> list[Segment]:
        """Returns the picture as something given: clean latents, then what the ViT sees of it."""
        return self.as_roles("clean", "vit", droppable=True)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A picture that is given, and the entity token of its role, if it has one."""

    picture: Shown
    token: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A frame: its place in the sequence (from 1), its step text, and the picture where there is one.

    A turn of number None has no time token: the one picture of a composition.
    """

    number: int | None
    step: str | None
    picture: Shown | None = None


def prologue(
    conditions: Sequence[Condition],
    prompt: str,
    plan: str | None = None,
    learn_plan: bool = False,
    method: Method = WHOLE,
) -> list[Segment]:
    """Returns what stands before the first frame. A plan that is learned is never dropped."""
    out: list[Segment] = []
    for condition in conditions:
        if condition.token is not None and method.entity_tokens:
            out.append(Text(condition.token))
        out += condition.picture.as_condition()
    out.append(Text(prompt, droppable=True))
    if plan is not None and method.planning:
        out.append(Text(plan, loss=learn_plan, droppable=not learn_plan))
    return out


def heading(turn: Turn, method: Method = WHOLE) -> list[Segment]:
    """Returns what stands before a frame: time token and step text, each a text of its own."""
    out: list[Segment] = []
    if turn.number is not None and method.time_tokens:
        out.append(Text(time_token(turn.number)))
    if turn.step is not None and method.planning:
        out.append(Text(turn.step, droppable=True))
    return out


def history(turns: Sequence[Turn], method: Method = WHOLE) -> list[Segment]:
    """Returns finished frames as later ones see them."""
    out: list[Segment] = []
    for turn in turns:
        assert turn.picture is not None
        out += [*heading(turn, method), *turn.picture.as_condition()]
    return out


def learned_frames(turns: Sequence[Turn], method: Method = WHOLE) -> list[Segment]:
    """Returns frames of a training document: each to be generated, and then, but for the last, as later ones see it."""
    out: list[Segment] = []
    for place, turn in enumerate(turns):
        assert turn.picture is not None
        out += [*heading(turn, method), *turn.picture.as_roles("noisy")]
        if place < len(turns) - 1:
            out += turn.picture.as_condition()
    return out


def branch(segments: Sequence[EncodedSegment], name: Branch) -> list[EncodedSegment]:
    """Returns the segments of a guidance branch: those it leaves out are marked as dropped, as in training."""
    left_out = {"cond": (), "no_text": ("text",), "no_image": ("clean", "vit")}[name]
    return drop_segments(segments, lambda kind: kind in left_out)


def find_entities(text: str, known: Callable[[str], bool] = ENTITY_TOKENS.__contains__) -> list[str]:
    """Returns the entity tokens that a text mentions, in order, each once.

    Args:
      text: an instruction.
      known: whether a token is one; a tokenizer's `has_token` takes those that were added to it as well.

    Raises:
      InputError: the text holds something spelled like an entity token that is not one.
    """
    mentioned = list(dict.fromkeys(re.findall(r"<(?:image \d+|[a-z][a-z_]*)>", text)))
    for token in mentioned:
        if not known(token):
            listed = ", ".join(ENTITY_TOKENS)
            raise InputError(f"unknown entity token {token!r} in {text[:60]!r}: expected one of {listed}")
    return mentioned


def assign_entities(
    instruction: str, count: int, known: Callable[[str], bool] = ENTITY_TOKENS.__contains__
) -> list[str | None]:
    """Returns the entity token of each of `count` condition images.

    They are those that the instruction mentions, in its order, if it mentions as many; else `<image 1>`, `<image 2>`;
    images beyond those have none.

    Raises:
      InputError: the instruction mentions something spelled like an entity token that is not one.
    """
    mentioned = find_entities(instruction, known)
    roles = mentioned if len(mentioned) >= count else [t for t in ("<image 1>", "<image 2>") if known(t)]
    return [roles[i] if i < len(roles) else None for i in range(count)]
