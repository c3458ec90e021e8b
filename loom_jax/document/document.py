"""Documents as a person thinks of them (texts and pictures), and as token runs that the layout places.

A document is an ordered list of segments. A text is a segment; an image is one segment for every role it plays:
`vit` (understood), `clean` (VAE latent, a condition) or `noisy` (VAE latent, to be generated).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image as PILImage

Role = Literal["vit", "clean", "noisy"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text. With `loss` its tokens and its end are learned; `droppable` for classifier-free guidance."""

    text: str
    loss: bool = False
    droppable: bool = False
    end_label: str | None = None
    """A token that the end of this text should predict (the original's special_token_label)."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in one role. The same picture as condition and as something understood is two segments.

    Attributes:
      moments: its latents, where they were computed beforehand: float [rows, columns, 2 * C * P * P], for every latent
        token its means and then its log variances. The VAE then need not see the picture.
    """

    image: PILImage.Image
    role: Role
    droppable: bool = False
    moments: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TextTokens:
    """An encoded text segment: token ids without begin and end marks."""

    ids: Sequence[int]
    loss: bool = False
    droppable: bool = False
    dropped: bool = False
    end_label: int | None = None


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """An encoded image segment of `grid` = (rows, columns) tokens.

    Attributes:
      pixels: float32 [H, W, 3] in [-1, 1], or uint8 where it was encoded `raw`, or None where only the layout is
        wanted. Segments that show one picture to the VAE twice share one array.
      moments: of the picture's latents (see `Picture`), in place of pixels.
      mode: overrides the attention mode of the role (video frames of the original are `full` although noisy).
      advance: overrides by how much the rope position moves on (video frames: the distance to the next frame).
      joins_previous: belongs to the split of the segment before it (frames of one video).
      end_label: token id that the end marker should predict, if any.
    """

    role: Role
    grid: tuple[int, int]
    pixels: np.ndarray | None = None
    moments: np.ndarray | None = None
    droppable: bool = False
    dropped: bool = False
    mode: int | None = None
    advance: int | None = None
    joins_previous: bool = False
    end_label: int | None = None


Segment = Text | Picture
EncodedSegment = TextTokens | ImageTokens


def drop_segments(segments: Sequence[EncodedSegment], should_drop: Callable[[str], bool]) -> list[EncodedSegment]:
    """Marks droppable segments as dropped; `should_drop` is asked once each with its kind (`text`, `vit`, `clean`).

    Source: the per-item dropout of the original's packer. A dropped segment vanishes with its markers, but the layout
    still counts the rope position of a dropped image.
    """
    out: list[EncodedSegment] = []
    for segment in segments:
        kind = "text" if isinstance(segment, TextTokens) else segment.role
        drop = segment.droppable and should_drop(kind)
        out.append(dataclasses.replace(segment, dropped=True) if drop else segment)
    return out
