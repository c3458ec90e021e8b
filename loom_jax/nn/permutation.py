"""Putting tokens in another order, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(x: jax.Array, places: jax.Array, back: jax.Array) -> jax.Array:
    """Returns x [B, S, ...] in the order of `places` [B, S], whose inverse is `back`.

    The backward pass gathers with the inverse, which a compiler could not know to be no scatter.
    """
    places = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="promise_in_bounds")


permute.defvjp(
    lambda x, places, back: (permute(x, places, back), (places, back)),
    lambda saved, grad: (permute(grad, saved[1], saved[0]), None, None),
)
