"""Batches of single pictures of one size, for networks that see nothing else: the autoencoder."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image as PILImage

from loom_jax.core import ConfigError, ImageError
from loom_jax.data.bad_rows import BadRow, RowCounts
from loom_jax.data.config import MixtureEntry
from loom_jax.data.sources import Row, open_source
from loom_jax.document import open_image, to_rgb

COLUMNS = ("condition_list", "image_list", "images", "image")
"""Columns of a row that hold encoded pictures."""


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    """Pictures to learn from.

    Attributes:
      mixture: data sets as of any training; of each only `source`, `recipe`, `paths`, `images` and `weight` are read.
      batch: pictures of a batch.
      side: pixels of a side; pictures of another size are scaled to it.
      seed: of what is drawn.
      max_bad_share, min_rows: more than this share of bad rows, after so many rows, stops the run.
    """

    mixture: tuple[MixtureEntry, ...]
    batch: int
    side: int
    seed: int = 42
    max_bad_share: float = 0.05
    min_rows: int = 200

    def __post_init__(self) -> None:
        if not self.mixture or self.batch < 1 or self.side < 1:
            raise ConfigError(
                f"mixture of {len(self.mixture)}, batch={self.batch}, side={self.side}: each must be at least 1"
            )


class Pictures:
    """Draws batches: uint8 [N, H, W, 3]. Batch k is always the same; the one after the last asked for is prepared.

    Raises:
      InputError: a data set is not there.
    """

    def __init__(self, config: PicturesConfig):
        self._config = config
        self._sources = [
            open_source(entry.source, entry.paths, images=entry.images, recipe=entry.recipe) for entry in config.mixture
        ]
        weights = np.asarray([entry.weight for entry in config.mixture])
        self._shares = weights / weights.sum()
        self._counts = RowCounts(config.max_bad_share, config.min_rows)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loom-pictures")
        self._coming: tuple[int, Future[np.ndarray]] | None = None

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns batch `number`.

        Raises:
          LoomError: too many rows have no picture that can be read.
        """
        if self._coming is not None and self._coming[0] == number:
            batch = self._coming[1].result()
        else:
            batch = self._draw(number)
        self._coming = number + 1, self._thread.submit(self._draw, number + 1)
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _draw(self, number: int) -> np.ndarray:
        rng = np.random.default_rng((self._config.seed, number))
        pictures: list[np.ndarray] = []
        while len(pictures) < self._config.batch:
            pictures += self._draw_row(rng)
        return np.stack(pictures[: self._config.batch])

    def _draw_row(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Returns all pictures of a row: to read it costs more than to learn from each of them."""
        entry = int(rng.choice(len(self._sources), p=self._shares))
        index = int(rng.integers(len(self._sources[entry])))
        try:
            pictures = self._read(self._sources[entry][index])
        except BadRow as fault:
            self._counts.add(fault, f"(row {index} of {self._config.mixture[entry].name})")
            return []
        self._counts.add(None)
        return pictures

    def _read(self, row: Row) -> list[np.ndarray]:
        columns = [row[name] for name in COLUMNS if row.get(name)]
        encoded = [picture for column in columns for picture in (column if isinstance(column, list) else [column])]
        if not encoded:
            raise BadRow("no image", f"the row has {', '.join(map(str, row))}")
        return [self._decode(picture) for picture in encoded]

    def _decode(self, encoded: bytes) -> np.ndarray:
        try:
            picture = to_rgb(open_image(encoded, "a picture"))
        except ImageError as error:
            raise BadRow("undecodable image", str(error)) from error
        size = (self._config.side, self._config.side)
        if picture.size != size:
            picture = picture.resize(size, PILImage.Resampling.BICUBIC)
        return np.asarray(picture)
