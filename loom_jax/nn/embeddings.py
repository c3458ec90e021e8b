"""Fixed tables and embeddings: 2-D sine/cosine positions and the timestep of the flow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.nn.projection import linear_dot

SINUSOID_WIDTH = 256
"""Width of the timestep sinusoid before its projection."""


def sincos_2d_table(dim: int, side: int) -> np.ndarray:
    """Returns the fixed position table of a side x side grid, float32 [side*side, dim], computed in float64.

    Row y*side + x holds [enc(x), enc(y)]: the column comes first; enc(u) = [sin(u w_k)] ++ [cos(u w_k)] with
    w_k = 10000^(-k / (dim/4)). Source: spec section 3.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(side, dtype=np.float64)[:, None] * frequencies
    encoded = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.divmod(np.arange(side * side), side)
    return np.concatenate([encoded[columns], encoded[rows]], axis=1).astype(np.float32)


def timestep_sinusoid(t: jax.Array, width: int = SINUSOID_WIDTH) -> jax.Array:
    """Returns [cos(t f_i), sin(t f_i)] for f_i = 10000^(-i / (width/2)): float32 [..., width]. t in [0, 1] as it is."""
    half = width // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Timestep [...] -> [..., D]: sinusoid, Linear, silu, Linear."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs, "dot_general": linear_dot}
        self.fc1 = nnx.Linear(SINUSOID_WIDTH, hidden_size, **options)
        self.fc2 = nnx.Linear(hidden_size, hidden_size, **options)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(nnx.silu(self.fc1(timestep_sinusoid(t))))


class PositionTable(nnx.Module):
    """A fixed 2-D sine/cosine table that travels with the weights: ids [...] -> [..., D]. Never trained."""

    def __init__(self, side: int, dim: int, *, param_dtype: DTypeLike):
        self.table = nnx.Param(jnp.asarray(sincos_2d_table(dim, side), param_dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.table[...][ids]
