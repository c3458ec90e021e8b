"""Latents computed once, before training: the posterior of every picture of a row, stored with the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image as PILImage

from loom_jax.core import ImageError
from loom_jax.data import BadRow, write_moments
from loom_jax.document import ImageTransform, normalize, open_image, pack_latent, to_rgb
from loom_jax.models import Autoencoder

COLUMNS = ("image", "image_list")
"""Columns with pictures that a VAE may see."""


class LatentEncoder:
    """Encodes pictures one by one, on canvases whose sides are rounded up to few lengths, so that few are compiled.

    Args:
      vae: the autoencoder.
      transform: that training will use for VAE pictures.
      patch: latent cells a side of a token.
      dtype: of what is stored; float16 halves the size and keeps latents to about 5e-4 of their own size.
    """

    def __init__(self, vae: Autoencoder, transform: ImageTransform, patch: int, dtype: Any = np.float16):
        self._transform, self._patch, self._dtype = transform, patch, dtype
        cell = vae.config.downsample * patch
        self._step = max(cell, -(-transform.max_size // 4 // cell) * cell)
        graphdef, params = nnx.split(vae)
        encode = jax.jit(lambda params, pixels, sizes: nnx.merge(graphdef, params).encode(pixels, sizes))
        self._encode = lambda pixels, sizes: encode(params, pixels, sizes)

    def __call__(self, image: PILImage.Image) -> np.ndarray:
        """Returns the moments of a picture, [rows, columns, 2CPP]: means, then log variances of each latent token."""
        pixels = normalize(self._transform.resize(to_rgb(image)))
        height, width, channels = pixels.shape
        canvas = np.zeros((1, *(-(-side // self._step) * self._step for side in (height, width)), channels), np.float32)
        canvas[0, :height, :width] = pixels
        moments = self._encode(jnp.asarray(canvas), jnp.asarray([[height, width]], jnp.int32))
        stride = canvas.shape[1] // moments.mean.shape[1]
        rows, columns = height // stride, width // stride
        tokens = [pack_latent(np.asarray(part)[0, :rows, :columns], self._patch) for part in moments]
        grid = rows // self._patch, columns // self._patch
        return np.concatenate(tokens, axis=-1).reshape(*grid, -1).astype(self._dtype)

    def add_to(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row with the moments of its pictures; a row without pictures for the VAE as it is.

        Raises:
          BadRow: a picture cannot be decoded.
        """
        column = next((name for name in COLUMNS if row.get(name) is not None), None)
        given = {"condition_moments": "condition_list"} | ({} if column is None else {"moments": column})
        stored = {key: self._moments(row[name], name) for key, name in given.items() if row.get(name)}
        return {**row, **stored}

    def _moments(self, pictures: Any, column: str) -> list[bytes]:
        moments = []
        for number, encoded in enumerate([pictures] if isinstance(pictures, bytes) else pictures):
            try:
                moments.append(write_moments(self(open_image(encoded, f"{column} {number}"))))
            except ImageError as error:
                raise BadRow("undecodable image", str(error)) from error
        return moments
