"""Random keys from (seed, step, purpose). Nothing about randomness is ever stored (DESIGN 5.8)."""

from __future__ import annotations

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of every seed's meaning: never renumber, only append."""

    INIT = 0
    POSTERIOR_NOISE = 1
    INITIAL_NOISE = 2
    TEXT_SAMPLING = 3
    TIMESTEP = 4
    FLOW_NOISE = 5
    ROUNDING = 6
    ADAPTERS = 7
    AVERAGE_ROUNDING = 8


def make_key(seed: int | jax.Array, purpose: Purpose, step: int | jax.Array = 0) -> jax.Array:
    """Returns the typed key of (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(purpose))
