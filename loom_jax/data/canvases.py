"""The VAE's side of a batch: pictures on canvases of a few static sizes, or latents computed before (DESIGN 5.12)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loom_jax.core import ConfigError
from loom_jax.data.config import CanvasConfig, DataConfig
from loom_jax.data.packing import Batch, Packable, Tables, pack
from loom_jax.document import NO_TOKEN, ImageTokens


class Canvas(NamedTuple):
    """Places for pictures of one size, N of them in each row."""

    pixels: Any
    """uint8 [B, N, H, W, 3]: a picture fills the top left corner, the rest is 0. (x / 255 - 0.5) / 0.5 is what the VAE
    takes."""
    sizes: Any
    """int32 [B, N, 2]: height and width in pixels of the picture, (0, 0) for a place that is not used."""


class TrainBatch(NamedTuple):
    """All that a training step takes: a pytree of numpy arrays with static shapes. B rows of this process."""

    batch: Batch
    canvases: tuple[Canvas, ...]
    """One for each size of the configuration; empty where `moments` is given."""
    latent_index: Any
    """int32 [B, G]: the place of each gen token in the row's pool of latent tokens, NO_TOKEN for filler. The pool joins
    all canvases in order, of each its N places, of each all cells of the whole canvas row by row."""
    moments: Any
    """None, or float32 [B, G, 2CPP]: means and then log variances of each gen token's latent, 0 for filler."""


def vae_images(document: Packable) -> list[ImageTokens]:
    """Returns the VAE images of a document in the order of their segments, as `LatentSource.image` counts them."""
    return document.images("clean", "noisy")


class Places:
    """Which canvases of one row are still free.

    Args:
      canvases: of the configuration.
    """

    def __init__(self, canvases: Sequence[CanvasConfig]):
        self._canvases = canvases
        self._by_area = sorted(range(len(canvases)), key=lambda k: canvases[k].height * canvases[k].width)
        self.free = [canvas.count for canvas in canvases]

    def choose(self, sizes: Sequence[tuple[int, int]]) -> list[int] | None:
        """Returns for each picture (height, width) the smallest canvas that has a free place, or None if one has none.

        The largest picture chooses first.
        """
        free, chosen = list(self.free), [-1] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1]):
            height, width = sizes[i]
            fits = (
                k
                for k in self._by_area
                if free[k] and height <= self._canvases[k].height and width <= self._canvases[k].width
            )
            chosen[i] = next(fits, -1)
            if chosen[i] < 0:
                return None
            free[chosen[i]] -= 1
        return chosen

    def take(self, chosen: Sequence[int]) -> None:
        """Takes the places that `choose` returned."""
        for k in chosen:
            self.free[k] -= 1


def check_canvases(canvases: Sequence[CanvasConfig], stride: int) -> None:
    """Raises ConfigError where a canvas is empty or cannot be cut into latent tokens of `stride` pixels."""
    for canvas in canvases:
        if canvas.height % stride or canvas.width % stride or min(canvas.height, canvas.width, canvas.count) < 1:
            raise ConfigError(
                f"canvas {canvas.height} x {canvas.width} ({canvas.count} of them): sides must be multiples of "
                f"{stride}, and there must be at least one"
            )


def distinct_pictures(images: Sequence[ImageTokens]) -> list[ImageTokens]:
    """Returns one image for each picture: segments that show the VAE the same pixels share a canvas."""
    return list({id(image.pixels): image for image in images}.values())


def picture_size(image: ImageTokens) -> tuple[int, int]:
    """Returns the height and width in pixels of an encoded picture."""
    if image.pixels is None:
        raise ValueError("an image without pixels has no size")
    height, width, _ = image.pixels.shape
    return height, width


def fill_canvases(
    rows: Sequence[Sequence[Packable]], canvases: Sequence[CanvasConfig], batch: Batch, stride: int
) -> TrainBatch:
    """Puts the pictures of packed rows onto canvases. The rows must fit, as `Places` says.

    Args:
      rows: the documents of each packed row.
      canvases: of the configuration.
      batch: the rows packed.
      stride: pixels a side of a latent token.
    """
    counts = [(canvas.count, canvas.height, canvas.width) for canvas in canvases]
    pixels = [np.zeros((len(rows), *shape, 3), np.uint8) for shape in counts]
    sizes = [np.zeros((len(rows), count, 2), np.int32) for count, _, _ in counts]
    cells = [(height // stride, width // stride) for _, height, width in counts]
    starts = np.cumsum([0, *(n * h * w for (n, _, _), (h, w) in zip(counts, cells, strict=True))])
    index = np.full(batch.latents.cell.shape, NO_TOKEN, np.int32)
    for b, documents in enumerate(rows):
        images = [image for document in documents for image in vae_images(document)]
        if not images:
            continue
        places = _place(documents, canvases)
        first, columns, own = (np.zeros(len(images), np.int64) for _ in range(3))
        for number, image in enumerate(images):
            k, n = places[id(image.pixels)]
            height, width = picture_size(image)
            pixels[k][b, n, :height, :width] = np.asarray(image.pixels)
            sizes[k][b, n] = height, width
            rows_of_cells, columns[number] = cells[k]
            first[number], own[number] = starts[k] + n * rows_of_cells * cells[k][1], image.grid[1]
        used = batch.latents.image[b] != NO_TOKEN
        image_of, cell = batch.latents.image[b][used], batch.latents.cell[b][used]
        row, column = np.divmod(cell, own[image_of])
        index[b, used] = first[image_of] + row * columns[image_of] + column
    return TrainBatch(batch, tuple(Canvas(p, s) for p, s in zip(pixels, sizes, strict=True)), index, None)


def _place(documents: Sequence[Packable], canvases: Sequence[CanvasConfig]) -> dict[int, tuple[int, int]]:
    """Returns the canvas and the place on it of every picture of a row, by the id of its pixels."""
    places, used, out = Places(canvases), [0] * len(canvases), {}
    for document in documents:
        pictures = distinct_pictures(vae_images(document))
        chosen = places.choose([picture_size(image) for image in pictures])
        if chosen is None:
            raise ValueError("the documents of a row do not fit onto its canvases")
        places.take(chosen)
        for image, k in zip(pictures, chosen, strict=True):
            out[id(image.pixels)] = k, used[k]
            used[k] += 1
    return out


def fill_moments(rows: Sequence[Sequence[Packable]], batch: Batch, width: int) -> TrainBatch:
    """Puts the stored latents of packed rows, `width` = 2CPP values each, beside their gen tokens."""
    shape = batch.latents.cell.shape
    stored = [[image.moments for document in documents for image in vae_images(document)] for documents in rows]
    moments = np.zeros((*shape, width), np.float32)
    for b, row in enumerate(stored):
        tokens = [m.reshape(-1, width) for m in row if m is not None]
        count = sum(map(len, tokens))
        if count:
            moments[b, :count] = np.concatenate(tokens)
    return TrainBatch(batch, (), np.full(shape, NO_TOKEN, np.int32), moments)


def abstract_batch(config: DataConfig, tables: Tables, stride: int) -> TrainBatch:
    """Returns the shapes and dtypes of a whole batch of `config.rows` rows, without their memory.

    Args:
      stride: pixels a side of a latent token.
    """
    row = pack([[]], config.budget, tables)
    if config.latents == "moments":
        batch = fill_moments([[]], row, 2 * tables.latent_dim)
    else:
        check_canvases(config.canvases, stride)
        batch = fill_canvases([[]], config.canvases, row, stride)
    return _of_rows(batch, config.rows)


def _of_rows(value: Any, rows: int) -> Any:
    """One row as `rows` of them, with strides of 0: nothing is copied."""
    if isinstance(value, np.ndarray):
        return np.broadcast_to(value, (rows, *value.shape[1:]))
    if value is None:
        return None
    parts = [_of_rows(part, rows) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
