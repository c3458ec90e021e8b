"""Where the random draws of a request come from: its seed alone, never its batch mates or the size of a bucket."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from loom_jax.generate.buckets import bucket
from loom_jax.nn import Purpose, make_key


class NoiseSource(Protocol):
    """Draws of standard normal noise. Parity hands in recorded ones."""

    def posterior(self, seed: int, image: int, grid: tuple[int, int], channels: int) -> np.ndarray:
        """Returns float32 [h, w, C] for input picture number `image` with latent cells `grid`."""
        ...

    def initial(self, seed: int, number: int, cells: int, channels: int) -> np.ndarray:
        """Returns float32 [G, C], the state from which picture `number` of a request is denoised."""
        ...


class SeededNoise:
    """Noise from the request's seed: the same cell of the same picture always gets the same draw."""

    def posterior(self, seed: int, image: int, grid: tuple[int, int], channels: int) -> np.ndarray:
        key = make_key(seed, Purpose.POSTERIOR_NOISE, image)
        return _normal(key, grid[0] * grid[1], channels).reshape(*grid, channels)

    def initial(self, seed: int, number: int, cells: int, channels: int) -> np.ndarray:
        return _normal(make_key(seed, Purpose.INITIAL_NOISE, number), cells, channels)


def _normal(key: jax.Array, cells: int, channels: int) -> np.ndarray:
    return np.asarray(_cell_normal(key, bucket(cells), channels))[:cells]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cell_normal(key: jax.Array, cells: int, channels: int) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(cells))
    return jax.vmap(lambda k: jax.random.normal(k, (channels,), jnp.float32))(keys)
