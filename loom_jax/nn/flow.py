"""Rectified flow: timesteps, the straight path from data (t = 0) to noise (t = 1), and its velocity (spec 7)."""

from __future__ import annotations

import jax
import numpy as np


def shift_timesteps(t: jax.Array, shift: float | jax.Array) -> jax.Array:
    """Moves timesteps towards noise: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def training_timesteps(normal: jax.Array, shift: float) -> jax.Array:
    """Returns the shifted sigmoid of standard normal draws; -inf (a clean image) gives exactly 0."""
    return shift_timesteps(jax.nn.sigmoid(normal), shift)


def interpolate(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the state (1 - t) clean + t noise; clean, noise [B, G, C], t [B, G] or [B, 1]."""
    return (1 - t[..., None]) * clean + t[..., None] * noise


def velocity_target(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns what the model learns to predict: noise - clean."""
    return noise - clean


def denoising_schedule(num_timesteps: int, shift: float) -> np.ndarray:
    """Returns the float32 [num_timesteps] times from 1 to 0: `num_timesteps - 1` steps lie between them."""
    t = np.linspace(1.0, 0.0, num_timesteps, dtype=np.float32)
    shift32 = np.float32(shift)
    # Rounding may lift the first time above 1, where no guidance interval would reach it.
    return np.minimum(shift32 * t / (1 + (shift32 - 1) * t), np.float32(1))
