"""Classifier-free guidance over up to three branches, and its renormalisation (spec section 11, sampler)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

RenormType = Literal["global", "channel", "text_channel"]


class Guidance(NamedTuple):
    """Scales, float32 [B], and the interval in which guidance acts, float32 scalars. All may change freely."""

    text_scale: jax.Array
    image_scale: jax.Array
    start: jax.Array
    """Guidance acts where start < t <= end, t being the shifted time."""
    end: jax.Array
    renorm_min: jax.Array


def guidance_is_active(guidance: Guidance, t: jax.Array) -> jax.Array:
    """Whether any row is guided at time t: a text scale of at most 1 turns guidance off, image scale included."""
    return (guidance.start < t) & (t <= guidance.end) & (guidance.text_scale > 1).any()


def guide(
    cond: jax.Array,
    no_text: jax.Array,
    no_image: jax.Array | None,
    guidance: Guidance,
    renorm: RenormType,
    held: jax.Array,
) -> jax.Array:
    """Combines velocities [B, G, C] of the branches.

    Args:
      no_image: None where no row has images to leave out.
      held: bool [B, G], which tokens are real. Norms are taken row by row over these alone, so a request's picture
        never depends on its batch mates.
    """
    text_scale, image_scale = (s[:, None, None] for s in (guidance.text_scale, guidance.image_scale))
    by_text = no_text + text_scale * (cond - no_text)
    guided = by_text
    if renorm == "text_channel":
        guided = _rescale(by_text, cond, guidance.renorm_min, held, per_token=True)
    if no_image is not None:
        by_image = no_image + image_scale * (guided - no_image)
        guided = jnp.where(image_scale > 1, by_image, guided)
    if renorm != "text_channel":
        guided = _rescale(guided, cond, guidance.renorm_min, held, per_token=renorm == "channel")
    return jnp.where(text_scale > 1, guided, cond)


def _rescale(guided: jax.Array, cond: jax.Array, least: jax.Array, held: jax.Array, per_token: bool) -> jax.Array:
    """Shrinks the guided velocity to the length of the conditional one; never lengthens it."""

    def norm(v: jax.Array) -> jax.Array:
        squares = jnp.where(held[..., None], v, 0.0) ** 2
        return jnp.sqrt(squares.sum(axis=-1 if per_token else (-2, -1), keepdims=True))

    return guided * jnp.clip(norm(cond) / (norm(guided) + 1e-8), least, 1.0)
