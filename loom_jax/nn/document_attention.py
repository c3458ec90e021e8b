"""Attention by documents: tokens are sorted by document, and only pairs of blocks that see each other are computed.

Queries and keys are sorted by (document, split, order), those of noise apart, since later splits do not see them. What
a block of queries needs is then few neighbouring blocks of keys, so the cost is that of the documents one by one, not
that of the row, wherever the two streams left their tokens. One loop runs over the needed pairs of blocks of all rows;
their number is not known when compiling. The sums are those of FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from loom_jax.document import NOISE, PADDING, TokenLayout
from loom_jax.nn.attention import ATTENTION_OUTPUT
from loom_jax.nn.attention_codes import NOBODY, Codes, attention_codes, meeting_blocks

_MASKED, _START = -1e30, -1e29
"""The logit of a forbidden pair, and the first peak: above it, so that the pair's weight is 0 even in an empty row."""


def document_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout, block_size: int = 64
) -> jax.Array:
    """Computes attention over pairs of sorted blocks; memory is linear in the length, forward and backward.

    Meant for CPUs, where a loop of unknown length costs nothing and a block lies in the cache.

    Args:
      block_size: queries and keys of a block.
    """
    (batch, q_len, heads, width), groups = q.shape, k.shape[2]
    sizes = min(block_size, q_len), min(block_size, k.shape[1])
    q_sort = _Sorting(q_layout, sizes[0])
    k_sort = q_sort if k_layout is q_layout else _Sorting(k_layout, sizes[1])
    codes = attention_codes(q_layout, k_layout)
    codes = Codes(
        first=q_sort.take(codes.first, 0),
        last=q_sort.take(codes.last, 0),
        own=q_sort.take(codes.own, NOBODY),
        code=k_sort.take(codes.code, -1),
    )
    pairs = _pairs(meeting_blocks(codes, *sizes))
    # [B, S, H, A] -> [B * blocks, K, R * block, A], and keys [B * blocks, K, block, A].
    queries = _cut(q_sort.sort(q), sizes[0]).reshape(-1, groups, heads // groups * sizes[0], width)
    keys, values = (_cut(k_sort.sort(x), sizes[1]) for x in (k, v))
    flat = Codes(*(a.reshape(-1, size) for a, size in zip(codes, (*sizes[:1] * 3, sizes[1]), strict=True)))
    out = _attend(queries, keys, values, flat, pairs)
    out = out.reshape(batch, -1, heads, sizes[0], width).swapaxes(2, 3).reshape(batch, -1, heads, width)
    return q_sort.unsort(out[:, :q_len])


class Pairs(NamedTuple):
    """Numbers of the blocks, counted over all rows, of each needed pair; `number` of them are real."""

    query: jax.Array
    key: jax.Array
    number: jax.Array


def _pairs(needed: jax.Array) -> Pairs:
    """needed [B, nq, nk] -> the pairs of blocks that are, ordered by query."""
    batch, num_q, num_k = needed.shape
    flat = jnp.nonzero(needed.reshape(-1), size=needed.size, fill_value=0)[0]
    return Pairs(flat // num_k, flat // (num_q * num_k) * num_k + flat % num_k, needed.sum())


def _place_code(layout: TokenLayout) -> jax.Array:
    """One number for the place of a token in the order of attention: clean ones by document, noise, then padding.

    Only speed depends on it: with more than 1,024 documents in a row noise would lie between clean tokens.
    """
    clean = layout.document * 2**20 + layout.order
    noise = 2**30 + layout.document * 2**16 + layout.split
    return jnp.where(layout.document == PADDING, 2**31 - 1, jnp.where(layout.mode == NOISE, noise, clean))


class _Sorting:
    """Takes arrays [B, S, ...] to the order of attention, filled up to whole blocks, and back."""

    def __init__(self, layout: TokenLayout, block: int):
        self._places = jnp.argsort(_place_code(layout), axis=1)
        self._back = jnp.argsort(self._places, axis=1)
        self._extra = -layout.document.shape[1] % block

    def take(self, x: jax.Array, filler: int) -> jax.Array:
        """Sorts numbers [B, S]."""
        x = jnp.take_along_axis(x, self._places, axis=1)
        return jnp.pad(x, ((0, 0), (0, self._extra)), constant_values=filler)

    def sort(self, x: jax.Array) -> jax.Array:
        """Sorts [B, S, H, A]."""
        return jnp.pad(_permute(x, self._places, self._back), ((0, 0), (0, self._extra), (0, 0), (0, 0)))

    def unsort(self, x: jax.Array) -> jax.Array:
        """Brings sorted [B, S, H, A], without filler, back."""
        return _permute(x, self._back, self._places)


@jax.custom_vjp
def _permute(x: jax.Array, places: jax.Array, back: jax.Array) -> jax.Array:
    """Gathers; the backward pass gathers with the inverse, which a compiler could not know to be no scatter."""
    return jnp.take_along_axis(x, places[..., None, None], axis=1, mode="promise_in_bounds")


_permute.defvjp(
    lambda x, places, back: (_permute(x, places, back), (places, back)),
    lambda saved, grad: (_permute(grad, saved[1], saved[0]), None, None),
)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[B, n * block, H, A] -> [B * n, H, block, A]."""
    return x.reshape(-1, block, *x.shape[2:]).swapaxes(1, 2)


def _mask(codes: Codes, i: jax.Array, j: jax.Array) -> jax.Array:
    """Who of query block i may attend to whom of key block j, bool [q, k]."""
    first, last, own = (a[i][:, None] for a in codes[:3])
    code = codes.code[j][None]
    return ((first <= code) & (code < last)) | (code == own)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled and masked logits of blocks [K, R q, A] and [K, k, A]: float32 [K, R q, k]."""
    logits = _dot(q, k, 2, 2) * q.shape[-1] ** -0.5
    return jnp.where(mask, logits.reshape(len(q), -1, *mask.shape), _MASKED).reshape(logits.shape)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix products of a batch, float32, summed over the axes named."""
    numbers = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, pairs: Pairs) -> jax.Array:
    return _forward(q, k, v, codes, pairs)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, pairs: Pairs) -> tuple[jax.Array, tuple[Any, ...]]:
    def step(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, j = pairs.query[n], pairs.key[n]
        old, total, out = (a[i] for a in carry)
        logits = _logits(q[i], k[j], _mask(codes, i, j))
        peak = jnp.maximum(old, logits.max(-1))
        weights, shrink = jnp.exp(logits - peak[..., None]), jnp.exp(old - peak)
        out = out * shrink[..., None] + _dot(weights.astype(v.dtype), v[j], 2, 1)
        new = peak, total * shrink + weights.sum(-1), out
        return tuple(lax.dynamic_update_index_in_dim(a, x, i, 0) for a, x in zip(carry, new, strict=True))

    zeros = jnp.zeros(q.shape, jnp.float32)
    start = (zeros[..., 0] + _START, zeros[..., 0], zeros)
    peak, total, out = lax.fori_loop(0, pairs.number, step, start)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = checkpoint_name((out / total[..., None]).astype(q.dtype), ATTENTION_OUTPUT)
    log_total = checkpoint_name(peak + jnp.log(total), ATTENTION_OUTPUT)
    return out, (q, k, v, codes, pairs, out, log_total)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, codes, pairs, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def step(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, j = pairs.query[n], pairs.key[n]
        qb, kb, vb, gb = q[i], k[j], v[j], grad[i]
        weights = jnp.exp(_logits(qb, kb, _mask(codes, i, j)) - log_total[i][..., None])
        slopes = weights * (_dot(gb, vb, 2, 2) - delta[i][..., None]) * scale
        adds = (
            (i, _dot(slopes.astype(kb.dtype), kb, 2, 1)),
            (j, _dot(slopes.astype(qb.dtype), qb, 1, 1)),
            (j, _dot(weights.astype(gb.dtype), gb, 1, 1)),
        )
        return tuple(
            lax.dynamic_update_index_in_dim(a, a[at] + x, at, 0) for a, (at, x) in zip(carry, adds, strict=True)
        )

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    grads = lax.fori_loop(0, pairs.number, step, start)
    return *(g.astype(a.dtype) for g, a in zip(grads, (q, k, v), strict=True)), None, None


_attend.defvjp(_forward, _backward)
