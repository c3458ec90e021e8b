"""Denoising: one compiled Euler loop over a schedule, and the velocity that it integrates (spec section 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loom_jax.data import Streams
from loom_jax.document import PADDING
from loom_jax.generate.context import BACKEND, Context, take_rows
from loom_jax.generate.guidance import Guidance, RenormType, guidance_is_active, guide
from loom_jax.models import Backend, Decoded, LoomModel, Past

Velocity = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""velocity(x [B, G, C], t, memory) -> (its value, the memory of the next step); `()` where nothing is remembered."""


def denoise(
    velocity: Velocity, x: jax.Array, memory: Any, schedule: jax.Array, start: jax.Array, stop: jax.Array
) -> tuple[jax.Array, Any]:
    """Takes the Euler steps `start` to `stop` of a schedule of times: x <- x - v(x, t_k) (t_k - t_{k+1}).

    Args:
      x: float32 [B, G, C], the state at time schedule[start].
      memory: what `velocity` remembers from step to step.
      schedule: float32 [T], falling; filler after `stop` + 1 is never read.
      start, stop: int32 scalars; traced, so that one compilation serves previews of any number of steps.

    Returns:
      The state at time schedule[stop], and the memory for going on from there.
    """

    def step(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, memory = carry
        v, memory = velocity(x, schedule[k], memory)
        return x - v * (schedule[k] - schedule[k + 1]), memory

    return jax.lax.fori_loop(start, stop, step, (x, memory))


def decode_latents(
    model: LoomModel, context: Context, streams: Streams, x: jax.Array, t: jax.Array, backend: Backend = BACKEND
) -> Decoded:
    """Runs the model on latents x [B, G, C] at time t (scalar) after a context, which is not changed."""
    timesteps = jnp.full((x.shape[0], 1), t, jnp.float32)
    return model(streams, x, timesteps, Past(context.kv, context.layout), **backend._asdict())


def branch_velocity(
    model: LoomModel, context: Context, streams: Streams, x: jax.Array, t: jax.Array, backend: Backend = BACKEND
) -> jax.Array:
    """Returns the velocity [B, G, C] of latents x at time t (scalar) after a context, which is not changed."""
    return model.velocity(decode_latents(model, context, streams, x, t, backend).gen)


def guided_velocity(
    model: LoomModel,
    contexts: Context,
    streams: Streams,
    guidance: Guidance,
    branches: int,
    renorm: RenormType,
    backend: Backend = BACKEND,
) -> Velocity:
    """Returns the guided velocity of B requests; their contexts lie branch after branch: cond, no-text, no-image.

    `contexts` and `streams` have branches * B rows. All branches of a step run as one batched forward; at times outside
    the guidance interval only the conditional rows run. Nothing is remembered from step to step.
    """
    rows = contexts.length.shape[0] // branches
    cond_context = take_rows(contexts, slice(0, rows))
    cond_streams = jax.tree.map(lambda a: a[:rows], streams)
    held = cond_streams.gen.document != PADDING

    def unguided(x: jax.Array, t: jax.Array) -> jax.Array:
        return branch_velocity(model, cond_context, cond_streams, x, t, backend)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        all_rows = jnp.concatenate([x] * branches)
        parts = jnp.split(branch_velocity(model, contexts, streams, all_rows, t, backend), branches)
        return guide(parts[0], parts[1], parts[2] if branches == 3 else None, guidance, renorm, held)

    def velocity(x: jax.Array, t: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        if branches == 1:
            return unguided(x, t), memory
        return jax.lax.cond(guidance_is_active(guidance, t), guided, unguided, x, t), memory

    return velocity
