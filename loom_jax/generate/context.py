"""Contexts: what was already read, as immutable pytrees of keys and values with a static capacity (DESIGN 5.5).

The token at place i of a document lies in slot i of its context, whatever stream it came from. Functions return a new
context; the one passed in stays as it was and may be extended again in another way (a fork).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from loom_jax.core import DecoderConfig
from loom_jax.data import Streams
from loom_jax.document import PADDING, TokenLayout
from loom_jax.models import Backend, Decoded, KeysValues, LoomModel, Past

BACKEND = Backend()
"""Whatever attention suits the length, on one device."""


class Context(NamedTuple):
    """Keys and values [L, B, N, K, A] of capacity N, their layout [B, N], and where each row goes on.

    `length` int32 [B]: tokens held. `position` int32 [B]: the next rope position. `split` int32 [B]: the next split.
    """

    kv: KeysValues
    layout: TokenLayout
    length: jax.Array
    position: jax.Array
    split: jax.Array

    @property
    def capacity(self) -> int:
        """Most tokens that a row can hold."""
        return self.layout.document.shape[1]


def empty_context(config: DecoderConfig, batch: int, capacity: int, dtype: DTypeLike) -> Context:
    """Returns a context of `batch` rows that holds nothing yet."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros((batch, capacity), jnp.int32)
    layout = TokenLayout(zeros + PADDING, zeros, zeros, zeros, zeros)
    start = jnp.zeros((batch,), jnp.int32)
    return Context(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), layout, start, start, start)


def start_context(
    model: LoomModel,
    streams: Streams,
    latents: jax.Array,
    position: jax.Array,
    split: jax.Array,
    capacity: int,
    backend: Backend = BACKEND,
) -> tuple[Context, Decoded]:
    """Reads the first tokens of every row into new contexts of `capacity`; arguments as in `extend_context`."""
    decoded = _read(model, streams, latents, None, backend)
    context = empty_context(model.config.decoder, latents.shape[0], capacity, model.dtype)
    return _store(context, decoded.kv, streams, position, split), decoded


def extend_context(
    model: LoomModel,
    context: Context,
    streams: Streams,
    latents: jax.Array,
    position: jax.Array,
    split: jax.Array,
    backend: Backend = BACKEND,
) -> tuple[Context, Decoded]:
    """Reads more tokens after a context: text, ViT tokens, and clean latents [B, G, C] (timestep 0).

    Rows may get different numbers of tokens; filler (document PADDING) is not stored. `streams` continues the order of
    the context, `position` and `split` [B] say where the next segment begins (the `end` of its layout).
    The caller sees to it that the capacity suffices: tokens beyond it would be lost.
    """
    decoded = _read(model, streams, latents, Past(context.kv, context.layout), backend)
    return _store(context, decoded.kv, streams, position, split), decoded


def _read(model: LoomModel, streams: Streams, latents: jax.Array, past: Past | None, backend: Backend) -> Decoded:
    timesteps = jnp.zeros((latents.shape[0], 1), jnp.float32)
    return model(streams, latents, timesteps, past, return_kv=True, **backend._asdict())


def _store(
    context: Context, new: KeysValues | None, streams: Streams, position: jax.Array, split: jax.Array
) -> Context:
    """Writes new keys and values to the slots that the layout's order names."""
    assert new is not None
    layout = TokenLayout(*(jnp.concatenate(pair, axis=1) for pair in zip(streams.und, streams.gen, strict=True)))
    held = layout.document != PADDING
    slots = jnp.where(held, layout.order, context.capacity)
    put = jax.vmap(lambda kept, add, slot: kept.at[:, slot].set(add.astype(kept.dtype), mode="drop"), (1, 1, 0), 1)
    put_layout = jax.vmap(lambda kept, add, slot: kept.at[slot].set(add, mode="drop"))
    return Context(
        kv=KeysValues(put(context.kv.k, new.k, slots), put(context.kv.v, new.v, slots)),
        layout=TokenLayout(*(put_layout(a, b, slots) for a, b in zip(context.layout, layout, strict=True))),
        length=context.length + held.sum(axis=1, dtype=jnp.int32),
        position=position,
        split=split,
    )


def take_rows(context: Context, rows: jax.Array | slice) -> Context:
    """Returns the context of some rows, in the order given; a row may be taken more than once."""
    kv = KeysValues(context.kv.k[:, rows], context.kv.v[:, rows])
    layout = TokenLayout(*(a[rows] for a in context.layout))
    return Context(kv, layout, context.length[rows], context.position[rows], context.split[rows])
