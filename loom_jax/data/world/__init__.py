"""The tutorial world: examples of all tasks with exact truth, their pictures and words, and a reader of pictures."""

from loom_jax.data.world.language import read_step, word_step
from loom_jax.data.world.reader import Reading, read_pictures
from loom_jax.data.world.render import SIDE, render
from loom_jax.data.world.rows import WorldRows, encode_png, open_world, to_row
from loom_jax.data.world.scene import (
    BACKGROUNDS,
    COLOURS,
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
    touched,
)
from loom_jax.data.world.tasks import TASKS, Example, WorldTask, draw_example, follow, in_order
from loom_jax.data.world.words import build_tokenizer, vocabulary

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "PAPER",
    "PLACES",
    "SHAPES",
    "SIDE",
    "SIZES",
    "SPLITS",
    "STYLES",
    "TASKS",
    "Add",
    "Example",
    "Move",
    "Paint",
    "Reading",
    "Recolour",
    "Remove",
    "Scene",
    "Split",
    "Step",
    "Thing",
    "WorldRows",
    "WorldTask",
    "apply",
    "build_tokenizer",
    "draw_example",
    "encode_png",
    "follow",
    "in_order",
    "open_world",
    "read_pictures",
    "read_step",
    "render",
    "to_row",
    "touched",
    "vocabulary",
    "word_step",
]
