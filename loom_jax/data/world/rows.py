"""The tutorial world as rows of a data set: without end, and without files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ConfigError
from loom_jax.data.bad_rows import BadRow
from loom_jax.data.recipes import rows_of
from loom_jax.data.world.render import render
from loom_jax.data.world.scene import SPLITS, Scene, Split
from loom_jax.data.world.tasks import TASKS, Example, WorldTask, draw_example
from loom_jax.document import format_plan

NUM_ROWS = 1 << 24
"""Rows of one epoch; the next one shows them in another order."""


class WorldRows:
    """Rows for one recipe; row i is always the same.

    For a task, a row has `instruction_list` (the instruction, and the plan if the task has one) and `image_list`: the
    frames of a tutorial or decomposition, or else the given pictures and then the target. `condition_list` holds the
    pictures given to a tutorial or decomposition, `entity_list` the token of each picture given to another task.

    For `t2i` and `edit`, which a model may know before it learns any task, a row is made of a tutorial: its instruction
    and last frame; or an empty sheet and all frames, with the step from each to the next.

    Args:
      recipe: `t2i`, `edit`, or the name of a task, which is that of its recipe too.
      split: one for training, or a held-out one.
      seed: of all examples.

    Raises:
      ConfigError: there are no rows for the recipe.
    """

    blocks: Sequence[int] = ()
    bad_files: Sequence[BadRow] = ()

    def __init__(self, recipe: str, split: Split = "train", seed: int = 0):
        if recipe not in _ROWS:
            raise ConfigError(f"the world has no rows for recipe {recipe!r}: there are rows for {', '.join(_ROWS)}")
        self._task, self._to_row = _ROWS[recipe]
        self._split, self._seed = split, seed

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._to_row(draw_example(self._task, self._split, self._seed, index))


def open_world(recipe: str, paths: Sequence[str] = ()) -> WorldRows:
    """Returns the rows for a recipe; `rows_of` says which share rows. `paths` may name the split.

    Raises:
      ConfigError: there are no such rows.
    """
    split = "train" if not paths else paths[0]
    if len(paths) > 1 or split not in SPLITS:
        raise ConfigError(f"paths={list(paths)} of the world: expected none, or one of {', '.join(SPLITS)}")
    return WorldRows(rows_of(recipe), split)


def to_row(example: Example) -> dict[str, Any]:
    """Returns an example as a row, as described at `WorldRows`."""
    pictures = [_stored(picture) for picture in render(example.scenes)]
    given = len(example.conditions)
    if not example.steps:
        entities = [token for token, _ in example.conditions]
        return {"image_list": pictures, "instruction_list": [example.instruction], "entity_list": entities}
    row = {"image_list": pictures[given:], "instruction_list": [example.instruction, format_plan(example.plan)]}
    return {**row, "condition_list": pictures[:given]} if given else row


def _captioned(example: Example) -> dict[str, Any]:
    (picture,) = render(example.frames[-1:])
    return {"captions": json.dumps({"caption": example.instruction}), "image": _stored(picture)}


def _edited(example: Example) -> dict[str, Any]:
    pictures = [_stored(picture) for picture in render([Scene(), *example.frames])]
    return {"image_list": pictures, "instruction_list": [[step] for step in example.plan]}


_ROWS: dict[str, tuple[WorldTask, Callable[[Example], dict[str, Any]]]] = {
    **{task: (task, to_row) for task in TASKS},
    "t2i": ("tutorial", _captioned),
    "edit": ("tutorial", _edited),
}


def encode_png(picture: np.ndarray, compress_level: int = 6) -> bytes:
    """Returns a picture, uint8 [H, W, 3], as a PNG file."""
    file = io.BytesIO()
    PILImage.fromarray(picture).save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def _stored(picture: np.ndarray) -> bytes:
    """A picture as rows hold it: it is decoded right away, so that time counts and size does not."""
    return encode_png(picture, compress_level=0)
