"""Which documents share a packed row: best fit among a few that wait, until both streams are full (DESIGN 5.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from loom_jax.data.bad_rows import BadRow, RowCounts
from loom_jax.data.canvases import Places, distinct_pictures, picture_size, vae_images
from loom_jax.data.config import CanvasConfig
from loom_jax.data.packing import Budget, Packable, Tables
from loom_jax.data.reader import Element

STREAMS = ("und", "gen", "vit")


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A document that waits for a row.

    Attributes:
      position: of its row of data within the shard.
      document: itself.
      share: float [3], how much of a row's und, gen and ViT budget it takes.
      sizes: of its pictures for the VAE, in pixels.
    """

    position: int
    document: Packable
    share: np.ndarray
    sizes: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Room:
    """What one packed row holds."""

    budget: Budget
    tables: Tables
    canvases: tuple[CanvasConfig, ...] | None
    """None where latents come with the rows."""

    def wait(self, position: int, document: Packable) -> Waiting:
        """Returns a document as one that waits.

        Raises:
          BadRow: it does not fit even into an empty row.
        """
        need = document.need
        for name in STREAMS:
            if getattr(need, name) > getattr(self.budget, name):
                raise BadRow(
                    f"needs more {name} tokens than a row has",
                    f"{getattr(need, name)}, the budget is {getattr(self.budget, name)}: raise it or shrink images",
                )
        for image in document.images("clean", "noisy", "vit"):
            side = self.tables.vit_side if image.role == "vit" else self.tables.max_latent_size
            if max(image.grid) > side:
                raise BadRow(
                    "image larger than the position table",
                    f"{image.grid[0]} x {image.grid[1]} tokens ({image.role}), the table has {side} a side",
                )
        sizes = [] if self.canvases is None else [picture_size(i) for i in distinct_pictures(vae_images(document))]
        if self.canvases is not None and Places(self.canvases).choose(sizes) is None:
            raise BadRow("no canvases for its images", f"pictures of {sizes} (height, width)")
        share = [getattr(need, name) / max(getattr(self.budget, name), 1) for name in STREAMS]
        return Waiting(position, document, np.asarray(share), sizes)


class Packer:
    """Fills the rows of one shard's part of a batch, again and again.

    Documents wait in the order they came. Of each batch the oldest ones begin the rows, one in each, so none waits
    forever; then the pair of document and row is taken whose need and remaining room have the largest dot product (a
    heuristic for packing in several dimensions: large ones first, and each where the room has its proportions).

    Args:
      elements: of the shard, in order of their positions after `waiting`.
      room: of one row.
      num_rows: rows to fill.
      look_ahead: documents for so many more rows are kept waiting.
      counts: where rows are counted.
      waiting: number of elements at the beginning that were counted and waited already, when the state was saved.
    """

    def __init__(
        self,
        elements: Iterator[Element],
        room: Room,
        num_rows: int,
        look_ahead: float,
        counts: RowCounts,
        waiting: int = 0,
    ):
        self._elements, self._room, self._num_rows = elements, room, num_rows
        self._enough = num_rows + look_ahead
        self.counts, self.next_position = counts, 0
        self._pool: list[Waiting] = []
        self._to_restore = waiting

    def positions(self) -> list[int]:
        """Returns the positions of the documents that wait, the oldest first."""
        return [waiting.position for waiting in self._pool]

    def next_rows(self) -> list[list[Packable]]:
        """Returns the documents of the next rows.

        Raises:
          LoomError: too many rows are bad.
        """
        while self._to_restore:
            self._to_restore -= 1
            self._read(counted=True)
        while sum(float(waiting.share.max()) for waiting in self._pool) < self._enough:
            self._read(counted=False)
        rows = fit(self._pool, self._num_rows, self._room.canvases)
        taken = {index for row in rows for index in row}
        out = [[self._pool[index].document for index in row] for row in rows]
        self._pool = [waiting for index, waiting in enumerate(self._pool) if index not in taken]
        return out

    def _read(self, counted: bool) -> None:
        """Takes one element; one that waited before is not counted again, unless it has gone bad since."""
        element = next(self._elements)
        position, fault = element.address.position, element.fault
        if element.document is not None:
            try:
                self._pool.append(self._room.wait(position, element.document))
            except BadRow as does_not_fit:
                fault = does_not_fit
        if not counted or fault is not None:
            self.counts.add(fault, f"(data set {element.address.entry}, row {element.address.row})")
        if not counted:
            self.next_position = position + 1


def fit(pool: Sequence[Waiting], num_rows: int, canvases: Sequence[CanvasConfig] | None) -> list[list[int]]:
    """Returns for each row the indices of the documents of `pool` that it gets."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    shares = np.stack([waiting.share for waiting in pool])
    room = np.ones((num_rows, len(STREAMS)))
    places = [Places(canvases or ()) for _ in range(num_rows)]
    open_pairs = np.ones((num_rows, len(pool)), bool)

    def put(row: int, index: int) -> bool:
        sizes = pool[index].sizes
        chosen = places[row].choose(sizes) if sizes else []
        if chosen is None:
            open_pairs[row, index] = False
            return False
        places[row].take(chosen)
        rows[row].append(index)
        room[row] -= shares[index]
        open_pairs[:, index] = False
        return True

    for row in range(min(num_rows, len(pool))):
        put(row, row)
    while True:
        # A little slack for the sums of fractions; the budgets are checked in whole tokens when rows are packed.
        fits = open_pairs & (shares[None] <= room[:, None] + 1e-9).all(-1)
        if not fits.any():
            return rows
        # The ViT's pool only has to be large enough; the two streams are to be full.
        score = np.where(fits, room[:, :2] @ shares[:, :2].T, -1.0)
        put(*map(int, np.unravel_index(int(score.argmax()), score.shape)))


def fill_of(batch: Any, canvases: Sequence[Any]) -> dict[str, float]:
    """Returns the used share of each stream, of the ViT pool and of the canvases' places of a batch."""
    streams = batch.streams
    out = {
        "fill/und": float((streams.und.document >= 0).mean()),
        "fill/gen": float((streams.gen.document >= 0).mean()),
        "fill/vit": float((streams.vit_segments >= 0).mean()),
    }
    if canvases:
        used = np.concatenate([(canvas.sizes[..., 0] > 0).ravel() for canvas in canvases])
        out["fill/canvases"] = float(used.mean())
    return out
