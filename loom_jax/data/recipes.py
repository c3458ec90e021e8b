"""Recipes: how a row of a data set becomes a document.

A recipe takes a row and a random generator and returns segments; it says which of them are learned and which may be
dropped. A row is a plain dict with encoded image bytes. Every fault of a row is a BadRow.
Sources: spec of Bagel, section 10; spec of Loom, "Order of segments".
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ImageError, InputError
from loom_jax.data.bad_rows import BadRow
from loom_jax.data.config import DropoutConfig
from loom_jax.document import (
    ENTITY_TOKENS,
    LOOM_TOKENS,
    WHOLE,
    Condition,
    HistoryPolicy,
    InterleavedTask,
    Method,
    Picture,
    Segment,
    Shown,
    Text,
    Turn,
    assign_entities,
    learned_frames,
    open_image,
    parse_steps,
    plan_prompt,
    prologue,
)

Row = Mapping[str, Any]
Build = Callable[..., list[Segment]]

PER_SEGMENT = DropoutConfig()
TOGETHER = DropoutConfig(text=0.1, clean=0.1, vit=0.1, together=True)
KEPT = DropoutConfig(text=0.0, clean=0.0, vit=0.0)
HISTORY = HistoryPolicy("random", 3)
"""Earlier frames that a tutorial's document shows (spec of Loom: the training default)."""
TURNS = tuple(token for token in LOOM_TOKENS if token.startswith("<|turn_"))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How rows become documents.

    Attributes:
      build: row, generator -> segments; also takes what `options` names.
      dropout: probabilities where the configuration gives none.
      shares_area: the images of a document share one bound on their area (`img_num` of the encoder).
      tokens: that the tokenizer must know.
      options: handed to `build`: `method` and `history` of `DataConfig`, `max_frames` of its entry.
    """

    build: Build
    dropout: DropoutConfig = PER_SEGMENT
    shares_area: bool = False
    tokens: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def t2i(row: Row, rng: np.random.Generator) -> list[Segment]:
    """Text to image: one of the captions, drawn evenly (a space where there is none), then the image."""
    captions = _value(row, "captions", str)
    try:
        choices = list(json.loads(captions).values())
    except (ValueError, AttributeError) as error:
        raise BadRow("captions are no JSON object", f"{captions[:80]!r}") from error
    caption = choices[int(rng.integers(len(choices)))] if choices else " "
    if not isinstance(caption, str) or not caption:
        raise BadRow("empty text", f"caption {caption!r}")
    (image,) = _pictures(row, "image")
    return [Text(caption, droppable=True), *image.as_roles("noisy")]


def edit(row: Row, rng: np.random.Generator, original: bool = False) -> list[Segment]:
    """Editing: from one image, over up to three instructions, to a later one; in one go or step by step.

    Draws the first image, the last one, whether several instructions are joined, and the wording of each instruction.

    Args:
      row: images, and for each step between two of them a list of wordings.
      rng: generator.
      original: join instructions as published: the last step of a row is left out, and a full stop is doubled.
    """
    images = _pictures(row, "image_list")
    wordings = _value(row, "instruction_list", list)
    if len(images) < 2 or len(wordings) < len(images) - 1:
        raise BadRow("instruction and image counts differ", f"{len(images)} images, {len(wordings)} instructions")
    start = int(rng.integers(0, len(images) - 1))
    end = int(rng.integers(start + 1, min(start + 3, len(images))))
    out = images[start].as_condition()
    if end - start > 1 and rng.random() < 0.5:
        if original and end == len(images) - 1:
            end -= 1
        texts = [_wording(wordings[step], rng) for step in range(start, end)]
        joined = "".join(f"{text if original else text.rstrip('. ')}. " for text in texts).rstrip()
        return [*out, Text(joined, droppable=True), *images[end].as_roles("noisy")]
    for step in range(start, end):
        target = images[step + 1]
        out += [Text(_wording(wordings[step], rng), droppable=True), *target.as_roles("noisy")]
        if step + 1 < end:
            out += target.as_condition()
    return out


def vlm(row: Row, rng: np.random.Generator) -> list[Segment]:
    """Conversations about images: answers are learned; images stand where the question says `<image>`."""
    if row.get("video") is not None:
        raise BadRow("video rows are not supported")
    images = _pictures(row, "images") if row.get("images") else []
    given = iter(images)
    out: list[Segment] = []
    for turn in _value(row, "conversations", list):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if speaker not in ("human", "gpt") or not isinstance(text, str):
            raise BadRow("conversation turn of unknown form", f"{str(turn)[:80]}")
        if speaker == "human":
            out += _question(text, given)
        elif text:
            out.append(Text(text, loss=True))
    if sum(isinstance(segment, Picture) for segment in out) != len(images):
        raise BadRow("<image> marks and images differ in number", f"{len(images)} images")
    if not any(isinstance(segment, Text) and segment.loss for segment in out):
        raise BadRow("nothing to learn", "the conversation has no answer")
    return out


def tutorial(
    row: Row,
    rng: np.random.Generator,
    task: InterleavedTask = "tutorial",
    history: HistoryPolicy = HISTORY,
    learn_plan: bool = True,
    learn_frames: bool = True,
    condition: Literal["given", "first", "last"] = "given",
    method: Method = WHOLE,
    max_frames: int | None = None,
) -> list[Segment]:
    """Interleaved output: conditions, prompt, plan, then frames, each after its time token and step text.

    Draws whether the prompt says how many steps there are, and one ordered subset of the frames; each frame of it sees
    those before it.

    Args:
      row: frames in `image_list`, the instruction and the plan in `instruction_list`, pictures that are given, if any,
        in `condition_list`.
      rng: generator.
      task: which prompt to use.
      history: how the subset is drawn.
      learn_plan: learn the whole plan, which is then never dropped; else it is given, and drops with the other texts.
      learn_frames: show and learn frames; else the document ends with the plan.
      condition: where there is no `condition_list`: nothing is given; or the first picture, which is then no frame; or
        the last frame, which is one.
      method: what is left out of the document.
      max_frames: show and learn none after the first so many.
    """
    instruction, plan = _texts(row, 2)
    frames, steps = _pictures(row, "image_list"), parse_steps(plan)
    conditions = _pictures(row, "condition_list") if row.get("condition_list") else []
    if not conditions and condition == "first":
        conditions, frames = frames[:1], frames[1:]
    elif not conditions and condition == "last":
        conditions = frames[-1:]
    if len(frames) != len(steps):
        raise BadRow("plan and image counts differ", f"{len(steps)} steps in the plan, {len(frames)} images")
    if len(frames) > len(TURNS):
        raise BadRow("more frames than time tokens", f"{len(frames)} frames, {len(TURNS)} tokens")
    if not all(steps):
        raise BadRow("empty text", f"a step of the plan {plan[:80]!r}")
    # Without a plan nothing else says how many there are to be.
    count = len(steps) if rng.integers(2) or not method.planning else None
    prompt = plan_prompt(task, instruction, count)
    start = prologue([Condition(image) for image in conditions], prompt, plan, learn_plan, method)
    if not learn_frames:
        if not method.planning:
            raise BadRow("nothing to learn", "a document that ends with its plan, without planning")
        return start
    chosen = history.choose_subset(len(frames[:max_frames]), rng)
    return [*start, *learned_frames([Turn(k + 1, steps[k], frames[k]) for k in chosen], method)]


def composition(row: Row, rng: np.random.Generator, method: Method = WHOLE) -> list[Segment]:
    """Interleaved input: images, each after the token of its role, an instruction that refers to them, and the result.

    The images are those of `image_list` but for the last, which is the result; their roles stand in `entity_list`, or
    are as `assign_entities` says.
    """
    (instruction,) = _texts(row, 1)
    *conditions, target = _pictures(row, "image_list")
    if not conditions:
        raise BadRow("no condition image", "one image in the row, expected conditions and then the target")
    try:
        roles = row.get("entity_list") or assign_entities(instruction, len(conditions))
    except InputError as error:
        raise BadRow("unknown entity token", str(error)) from error
    if len(roles) != len(conditions) or not all(role is None or role in ENTITY_TOKENS for role in roles):
        raise BadRow("unknown entity token", f"roles {list(roles)} for {len(conditions)} images")
    given = [Condition(image, role) for image, role in zip(conditions, roles, strict=True)]
    return [*prologue(given, instruction, method=method), *learned_frames([Turn(None, None, target)])]


_PLANNED: dict[str, Any] = {"dropout": TOGETHER, "tokens": TURNS, "options": ("method", "history", "max_frames")}
_COMPOSED: dict[str, Any] = {"dropout": TOGETHER, "tokens": ENTITY_TOKENS, "options": ("method",)}
_PLAN_ALONE: dict[str, Any] = {"dropout": KEPT, "options": ("method",)}
_image_tutorial = partial(tutorial, condition="last")
_decomposition = partial(tutorial, task="decompose", history=HistoryPolicy("none", 0), condition="first")

RECIPES: dict[str, Recipe] = {
    "t2i": Recipe(t2i),
    "edit": Recipe(edit),
    "vlm": Recipe(vlm, shares_area=True),
    "tutorial": Recipe(tutorial, **_PLANNED),
    "tutorial_frames": Recipe(partial(tutorial, learn_plan=False), **_PLANNED),
    "tutorial_plan": Recipe(partial(tutorial, learn_frames=False), **_PLAN_ALONE),
    "image_tutorial": Recipe(_image_tutorial, **_PLANNED),
    "image_tutorial_frames": Recipe(partial(_image_tutorial, learn_plan=False), **_PLANNED),
    "image_tutorial_plan": Recipe(partial(_image_tutorial, learn_frames=False), **_PLAN_ALONE),
    "decomposition": Recipe(_decomposition, **_PLANNED),
    "decomposition_frames": Recipe(partial(_decomposition, learn_plan=False), **_PLANNED),
    "decomposition_plan": Recipe(partial(_decomposition, learn_frames=False), **_PLAN_ALONE),
    "composition": Recipe(composition, **_COMPOSED),
    "style": Recipe(composition, **_COMPOSED),
}
"""Every recipe by the name that configurations use.

Those named `_frames` give the plan instead of learning it, so that it can be dropped: mix some in, for the guidance
branch without text has no plan. Those named `_plan` end with the plan: short documents, many in a batch, for a planner
that is not right yet.
"""


def rows_of(recipe: str) -> str:
    """Returns the recipe by whose name the rows go: `tutorial_frames` takes the rows of `tutorial`."""
    return recipe.removesuffix("_frames").removesuffix("_plan")


def _value(row: Row, name: str, kind: type) -> Any:
    """Returns a column of a row, checked."""
    value = row.get(name)
    if value is None:
        raise BadRow(f"missing column {name}", f"the row has {', '.join(map(str, row))}")
    if not isinstance(value, kind):
        raise BadRow(f"column {name} of the wrong type", f"found {type(value).__name__}, expected {kind.__name__}")
    return value


def _texts(row: Row, count: int) -> list[str]:
    """Returns the first `count` texts of `instruction_list`, none of them empty."""
    texts = _value(row, "instruction_list", list)
    if len(texts) < count or not all(isinstance(text, str) and text.strip() for text in texts[:count]):
        raise BadRow("empty text", f"instruction_list needs {count} texts that are not empty, found {len(texts)}")
    return texts[:count]


def _wording(wordings: Any, rng: np.random.Generator) -> str:
    """Returns one of the wordings of an instruction, drawn evenly."""
    if not isinstance(wordings, list) or not all(isinstance(text, str) and text.strip() for text in wordings):
        raise BadRow("empty text", "an instruction is empty, or no list of wordings")
    if not wordings:
        raise BadRow("empty text", "an instruction without wordings")
    return wordings[int(rng.integers(len(wordings)))]


def _question(text: str, images: Any) -> list[Segment]:
    """Returns what a person said: texts, and the next of `images` at every `<image>`."""
    out: list[Segment] = []
    for number, piece in enumerate(text.split("<image>")):
        if number:
            image = next(images, None)
            if image is None:
                raise BadRow("<image> marks and images differ in number", "fewer images than marks")
            out += image.as_roles("vit")
        if piece.strip():
            out.append(Text(piece.strip()))
    return out


def _pictures(row: Row, name: str) -> list[Shown]:
    """Returns the decoded pictures of a column, with the stored latents if the row has some."""
    value = row.get(name)
    encoded = [value] if isinstance(value, bytes) else _value(row, name, list)
    if not encoded:
        raise BadRow("no image", f"column {name} is empty")
    moments_of = "condition_moments" if name == "condition_list" else "moments"
    stored: Sequence[bytes | None] = row.get(moments_of) or [None] * len(encoded)
    if len(stored) != len(encoded):
        raise BadRow("moments and images differ in number", f"{len(stored)} and {len(encoded)}")
    return [
        Shown(_decode(image, f"image {number}"), None if moments is None else read_moments(moments))
        for number, (image, moments) in enumerate(zip(encoded, stored, strict=True))
    ]


def _decode(encoded: Any, name: str) -> PILImage.Image:
    if not isinstance(encoded, bytes):
        raise BadRow("undecodable image", f"{name} is {type(encoded).__name__}, expected bytes")
    try:
        return open_image(encoded, name)
    except ImageError as error:
        raise BadRow("undecodable image", str(error)) from error


def read_moments(encoded: bytes) -> np.ndarray:
    """Returns stored latents, float [rows, columns, 2CPP] (undoes `write_moments`)."""
    try:
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadRow("unreadable moments", str(error)) from error
    if array.ndim != 3:
        raise BadRow("unreadable moments", f"shape {array.shape}, expected rows, columns, values")
    return array


def write_moments(moments: np.ndarray) -> bytes:
    """Returns latents [rows, columns, 2CPP] as the bytes that rows store."""
    file = io.BytesIO()
    np.save(file, moments, allow_pickle=False)
    return file.getvalue()
