"""The page of `loom data inspect`: rows as tables of segments with thumbnails, tokens and a picture of the layout."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import LoomError
from loom_jax.data import RECIPES, BadRow
from loom_jax.document import LOOM_TOKENS, ImageTransform, Picture, Segment, Text, Tokenizer, to_rgb

THUMBNAIL = 160
MARKS = 2
"""Tokens that frame every segment."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One segment as the page shows it. `tokens` counts its marks too; None where no tokenizer was given."""

    kind: str
    learned: bool
    droppable: bool
    tokens: int | None
    text: str = ""
    picture: str = ""
    size: str = ""


@dataclasses.dataclass(frozen=True)
class Shown:
    """One row: its segments, or its fault."""

    index: int
    lines: list[Line]
    fault: str = ""

    @property
    def total(self) -> int:
        """Tokens of all segments whose number is known."""
        return sum(line.tokens or 0 for line in self.lines)


def write_page(args: argparse.Namespace, source: Any) -> int:
    """Writes the page that the arguments of the command ask for and returns the number of rows on it.

    Raises:
      LoomError: the file cannot be written.
    """
    tokenizer = Tokenizer.from_folder(args.tokenizer).with_tokens(LOOM_TOKENS) if args.tokenizer else None
    show = _Show(tokenizer, ImageTransform(*args.vae_transform), ImageTransform(*args.vit_transform))
    shown = []
    for index in range(args.start, min(args.start + args.rows, len(source))):
        try:
            segments = RECIPES[args.recipe].build(source[index], np.random.default_rng((args.seed, index)))
            shown.append(Shown(index, [show(segment) for segment in segments]))
        except BadRow as fault:
            shown.append(Shown(index, [], str(fault)))
    page = render(
        title=f"{args.recipe} rows from {args.source}",
        rows=shown,
        count=len(source),
        bad_files=[str(fault) for fault in source.bad_files],
        counted=tokenizer is not None,
    )
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise LoomError(f"cannot write {args.out}: {error.strerror}") from error
    return len(shown)


def render(**values: Any) -> str:
    """Returns the page: one file that needs nothing else."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("data_page.html").render(**values)


class _Show:
    """Turns segments into lines of the page."""

    def __init__(self, tokenizer: Tokenizer | None, vae: ImageTransform, vit: ImageTransform):
        self._tokenizer, self._vae, self._vit = tokenizer, vae, vit

    def __call__(self, segment: Segment) -> Line:
        if isinstance(segment, Text):
            count = None if self._tokenizer is None else len(self._tokenizer.encode(segment.text)) + MARKS
            return Line("text", segment.loss, segment.droppable, count, text=segment.text)
        transform = self._vit if segment.role == "vit" else self._vae
        width, height = transform.size(*segment.image.size)
        cells = (width // transform.stride) * (height // transform.stride)
        size = f"{segment.image.width} x {segment.image.height} -> {width} x {height}"
        learned = segment.role == "noisy"
        return Line(segment.role, learned, segment.droppable, cells + MARKS, picture=_thumbnail(segment), size=size)


def _thumbnail(picture: Picture) -> str:
    """Returns a small JPEG of a picture as a data URL."""
    small = to_rgb(picture.image).copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), PILImage.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
