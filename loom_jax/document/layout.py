"""The layout of a document: every token's stream, split, mode, order and rope position. The only place that counts.

Source: spec section 3. Training packs these layouts, generation extends a context with them; both get the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from loom_jax.document.document import EncodedSegment, ImageTokens, TextTokens
from loom_jax.document.mask import CAUSAL, FULL, NOISE, TokenLayout

NO_TOKEN = -1
"""Where an index or label does not apply."""

Weighting = Literal["token", "sample", "square"]


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Token ids of the marks that frame segments."""

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int


@dataclasses.dataclass(frozen=True)
class LayoutState:
    """Where a layout begins: zero for a new document, the end of a context for one that goes on."""

    order: int = 0
    position: int = 0
    split: int = 0


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """All tokens of a document in order; arrays [S].

    Attributes:
      tokens: document (all 0), split, mode, order and rope position.
      token_ids: int32, the text token or marker, NO_TOKEN for image tokens.
      segment: int32, index of the segment that a token belongs to.
      cell: int32, row-major index in the image grid, NO_TOKEN for text and markers.
      is_gen: bool, True for VAE latent tokens (gen stream), False for the rest (und stream).
      labels: int32, the token to predict here, NO_TOKEN for none.
      label_weights: float32, weight of that prediction, 0 where there is none.
      split_lengths, split_modes: one entry a split.
      end: where the next segment would begin.
    """

    tokens: TokenLayout
    token_ids: np.ndarray
    segment: np.ndarray
    cell: np.ndarray
    is_gen: np.ndarray
    labels: np.ndarray
    label_weights: np.ndarray
    split_lengths: np.ndarray
    split_modes: np.ndarray
    end: LayoutState

    def __len__(self) -> int:
        return len(self.token_ids)


def label_weight(length: int, weighting: Weighting) -> float:
    """Weight of each of the `length` supervised tokens of a text (the original's len2weight)."""
    return {"token": 1.0, "sample": 1.0 / length, "square": length**-0.5}[weighting]


def lay_out(
    segments: Sequence[EncodedSegment],
    special: SpecialIds,
    start: LayoutState = LayoutState(),
    weighting: Weighting = "square",
) -> DocumentLayout:
    """Places the tokens of `segments`, beginning at `start`.

    Text moves the rope position on by its length with both marks; a `vit` or `clean` image by 1; a `noisy` image not at
    all, so that its clean copy shares its position. A dropped image still moves it by 1, a dropped text does not.
    """
    runs: list[_Run] = []
    position, split = start.position, start.split - 1
    joinable = False  # whether the last run belongs to the video, if any, that this segment goes on with
    for index, segment in enumerate(segments):
        joins = joinable and isinstance(segment, ImageTokens) and segment.joins_previous
        joinable = joins or not segment.dropped
        if not segment.dropped:
            if not joins:
                split += 1
            if isinstance(segment, TextTokens):
                runs.append(_text_run(segment, index, split, position, special, weighting))
            else:
                mode = runs[-1].mode if joins else None
                runs.append(_image_run(segment, index, split, position, special, mode))
        position += _advance(segment)
    return _join(runs, start, LayoutState(0, position, split + 1))


@dataclasses.dataclass(frozen=True)
class _Run:
    """Tokens of one segment."""

    token_ids: np.ndarray
    cell: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    label_weights: np.ndarray
    mode: int
    segment: int
    split: int
    is_gen: np.ndarray


def _text_run(
    text: TextTokens, index: int, split: int, position: int, special: SpecialIds, weighting: Weighting
) -> _Run:
    ids = np.asarray(text.ids, np.int32)
    n = len(ids) + 2
    labels, weights = np.full(n, NO_TOKEN, np.int32), np.zeros(n, np.float32)
    if text.loss:
        labels[:-1] = np.append(ids, special.eos)
        weights[:-1] = label_weight(n - 1, weighting)
    if text.end_label is not None:
        labels[-1], weights[-1] = text.end_label, 1.0
    return _Run(
        token_ids=np.concatenate([[special.bos], ids, [special.eos]]).astype(np.int32),
        cell=np.full(n, NO_TOKEN, np.int32),
        positions=np.arange(position, position + n, dtype=np.int32),
        labels=labels,
        label_weights=weights,
        mode=CAUSAL,
        segment=index,
        split=split,
        is_gen=np.zeros(n, bool),
    )


def _image_run(
    image: ImageTokens, index: int, split: int, position: int, special: SpecialIds, joined_mode: int | None
) -> _Run:
    cells = image.grid[0] * image.grid[1]
    n = cells + 2
    token_ids, cell = np.full(n, NO_TOKEN, np.int32), np.full(n, NO_TOKEN, np.int32)
    token_ids[0], token_ids[-1] = special.start_of_image, special.end_of_image
    cell[1:-1] = np.arange(cells)
    labels, weights = np.full(n, NO_TOKEN, np.int32), np.zeros(n, np.float32)
    if image.end_label is not None:
        labels[-1], weights[-1] = image.end_label, 1.0
    mode = NOISE if image.role == "noisy" else FULL
    if image.mode is not None:
        mode = image.mode
    return _Run(
        token_ids=token_ids,
        cell=cell,
        positions=np.full(n, position, np.int32),
        labels=labels,
        label_weights=weights,
        mode=mode if joined_mode is None else joined_mode,
        segment=index,
        split=split,
        is_gen=(cell != NO_TOKEN) & (image.role != "vit"),
    )


def _advance(segment: EncodedSegment) -> int:
    """By how much a segment moves the rope position on."""
    if isinstance(segment, TextTokens):
        return 0 if segment.dropped else len(segment.ids) + 2
    if segment.advance is not None:
        return segment.advance
    return 0 if segment.role == "noisy" else 1


def _join(runs: Sequence[_Run], start: LayoutState, end: LayoutState) -> DocumentLayout:
    lengths = [len(run.token_ids) for run in runs]
    total = sum(lengths)

    def column(values: list, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *values]).astype(dtype)

    def repeat(values: list[int]) -> np.ndarray:
        return np.repeat(np.asarray(values, np.int32), lengths).astype(np.int32)

    splits = repeat([run.split for run in runs])
    distinct, split_lengths = np.unique(splits, return_counts=True)
    modes = {run.split: run.mode for run in runs}
    return DocumentLayout(
        tokens=TokenLayout(
            document=np.zeros(total, np.int32),
            split=splits,
            mode=repeat([run.mode for run in runs]),
            order=np.arange(start.order, start.order + total, dtype=np.int32),
            position=column([run.positions for run in runs], np.int32),
        ),
        token_ids=column([run.token_ids for run in runs], np.int32),
        segment=repeat([run.segment for run in runs]),
        cell=column([run.cell for run in runs], np.int32),
        is_gen=column([run.is_gen for run in runs], bool),
        labels=column([run.labels for run in runs], np.int32),
        label_weights=column([run.label_weights for run in runs], np.float32),
        split_lengths=split_lengths.astype(np.int32),
        split_modes=np.asarray([modes[s] for s in distinct], np.int32),
        end=LayoutState(start.order + total, end.position, end.split),
    )
