"""TaylorSeer: most steps of denoising predict what the last layer would give instead of running the layers.

Liu et al. 2025, "From Reusable to Forecasting: Accelerating Diffusion Models with TaylorSeers", as the original has it
(spec section 11). A guidance branch takes full steps at its own evaluations 0 to 4 and every third one after that. From
full steps it keeps the residual stream F_0 and backward differences F_1 to F_6 of it; the steps between them take the
sum of F_i x^i / i!, x evaluations after the last full one. The original keeps this for every layer, of which only the
last layer's is ever used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from loom_jax.data import Streams
from loom_jax.document import PADDING
from loom_jax.generate.context import BACKEND, Context, take_rows
from loom_jax.generate.denoise import Velocity, decode_latents
from loom_jax.generate.guidance import Guidance, RenormType, guidance_is_active, guide
from loom_jax.models import Backend, LoomModel

FIRST_FULL = 5
"""So many evaluations are full at the beginning."""
PERIOD = 3
"""Afterwards one in so many is."""
ORDERS = 6
"""The highest order of differences."""


class Forecast(NamedTuple):
    """What is kept between steps: `factors` F_0 to F_6, float32 [7, R, G, D] of branches * B rows R (4,096 tokens of
    width 3,584 take 392 MiB a row), and `counts` int32 [2]: evaluations so far, conditional and guided."""

    factors: jax.Array
    counts: jax.Array


def start_forecast(rows: int, cells: int, width: int, backend: Backend = BACKEND) -> Forecast:
    """Returns a Forecast that knows nothing yet, for `rows` of `cells` latent tokens."""
    factors = jnp.zeros((ORDERS + 1, rows, cells, width), jnp.float32)
    return Forecast(_place(factors, backend), jnp.zeros(2, jnp.int32))


def _place(factors: jax.Array, backend: Backend) -> jax.Array:
    return backend.constrain(factors, (None, "batch", "length", "embed"))


def is_full(k: jax.Array) -> jax.Array:
    """Whether evaluation k of a branch (from 0) runs the layers."""
    return (k < FIRST_FULL) | ((k - FIRST_FULL + 1) % PERIOD == 0)


def since_full(k: jax.Array) -> jax.Array:
    """Returns how many evaluations before k the last full one was; 0 if k is full."""
    return jnp.where(k < FIRST_FULL, 0, (k - FIRST_FULL + 1) % PERIOD)


def renew(factors: jax.Array, hidden: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the factors [7, ...] after the full evaluation k gave `hidden`: one order more than before, at most 6."""
    gap = jnp.where(k < FIRST_FULL, 1, PERIOD)
    known = (k - FIRST_FULL + 1) // PERIOD + 1
    new = [hidden.astype(jnp.float32)]
    for i in range(ORDERS):
        grows = (k >= FIRST_FULL - 1) & (i < known)
        new.append(jnp.where(grows, (new[i] - factors[i]) / gap, 0.0))
    return jnp.stack(new)


def extrapolate(factors: jax.Array, steps: jax.Array) -> jax.Array:
    """Returns the sum of F_i x^i / i! for x = `steps`, which broadcasts against F_i; F_0 itself at x = 0."""
    total = factors[ORDERS]
    for i in reversed(range(ORDERS)):
        total = factors[i] + total * steps / (i + 1)
    return total


def forecast_velocity(
    model: LoomModel,
    contexts: Context,
    streams: Streams,
    guidance: Guidance,
    branches: int,
    renorm: RenormType,
    backend: Backend = BACKEND,
) -> Velocity:
    """Returns the guided velocity as `guided_velocity` does, with a Forecast as its memory.

    Only rows whose evaluation is full run through the layers: all in one batched forward, the conditional ones alone,
    the others alone (where guidance begins late, their full steps fall elsewhere), or none.
    """
    total = contexts.length.shape[0]
    rows = total // branches
    held = streams.gen.document[:rows] != PADDING

    def run(first: int, last: int) -> Callable[..., jax.Array]:
        context, own = take_rows(contexts, slice(first, last)), jax.tree.map(lambda a: a[first:last], streams)

        def renewed(factors: jax.Array, x: jax.Array, t: jax.Array, k: jax.Array) -> jax.Array:
            hidden = decode_latents(model, context, own, x[first:last], t, backend).residual[1]
            new = renew(factors[:, first:last], hidden, k[first:last])
            return _place(factors.at[:, first:last].set(new), backend)

        return renewed

    choices = [lambda factors, x, t, k: factors, run(0, rows)]
    if branches > 1:
        choices += [run(rows, total), run(0, total)]

    def velocity(x: jax.Array, t: jax.Array, forecast: Forecast) -> tuple[jax.Array, Forecast]:
        active = guidance_is_active(guidance, t) & (branches > 1)
        cond, guided = forecast.counts
        k = jnp.where(jnp.arange(total) < rows, cond, guided)[:, None, None]
        choice = is_full(cond) + 2 * (active & is_full(guided))
        factors = jax.lax.switch(choice, choices, forecast.factors, jnp.concatenate([x] * branches), t, k)
        hidden = extrapolate(factors, since_full(k).astype(jnp.float32))
        v = jnp.split(model.velocity(model.decoder.norm.gen(hidden.astype(model.dtype))), branches)
        chosen = v[0]
        if branches > 1:
            combined = guide(v[0], v[1], v[2] if branches == 3 else None, guidance, renorm, held)
            chosen = jnp.where(active, combined, v[0])
        return chosen, Forecast(factors, jnp.stack([cond + 1, guided + active]))

    return velocity
