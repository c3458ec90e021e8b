"""Rotary positions in the half-split convention of Qwen2 (spec section 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_frequencies(head_dim: int, theta: float) -> jax.Array:
    """Returns the inverse frequencies theta^(-2i/A), float32 [A/2]."""
    return 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))


def rope_tables(position: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) of the angles at int32 positions [B, S]: float32 [B, S, A/2]."""
    angles = position.astype(jnp.float32)[..., None] * rope_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the channel pairs (i, i + A/2) of x [B, S, H, A] by the angles of `tables`; float32 inside, dtype kept."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
