"""Attention by documents: tokens are sorted by document, and a block of queries meets the keys of its documents alone.

Queries and keys are sorted by document, in it by order, and noise comes last. All keys that a block of queries may see
then lie in one range, which is read at once: the cost is that of the documents one by one, not that of the row,
wherever the two streams left their tokens. How long the ranges are is not known when compiling, so there is a loop for
each of a few lengths, over the blocks whose ranges it fits. The sums are those of FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from loom_jax.document import NOISE, PADDING, TokenLayout
from loom_jax.nn.attention import ATTENTION_OUTPUT
from loom_jax.nn.attention_codes import NOBODY, Codes, attention_codes, meeting_blocks
from loom_jax.nn.permutation import permute

_MASKED, _START = -1e30, -1e29
"""The logit of a forbidden pair, and the least peak: above it, so that the pair's weight is 0 even in an empty row."""


def document_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout, block_size: int = 192
) -> jax.Array:
    """Computes attention over sorted blocks of queries; memory is linear in the length, forward and backward.

    Meant for CPUs, where a loop of unknown length costs nothing and what a block needs lies in the cache.

    Args:
      block_size: queries of a block; lengths of ranges are counted in it. Shorter ones take in fewer pairs of others'
        documents, but of two threads one often works alone: with 64, a step on documents of 300 to 820 tokens took 9 %
        longer, one on documents of some 100 tokens 5 to 7 % less.
    """
    (batch, q_len, heads, width), groups = q.shape, k.shape[2]
    block = min(block_size, q_len)
    q_sort = _Sorting(q_layout, block)
    k_sort = q_sort if k_layout is q_layout else _Sorting(k_layout, block)
    codes = attention_codes(q_layout, k_layout)
    codes = Codes(
        first=q_sort.take(codes.first, 0),
        last=q_sort.take(codes.last, 0),
        own=q_sort.take(codes.own, NOBODY),
        code=k_sort.take(codes.code, -1),
    )
    # [B, S, H, A] -> [B * blocks, K, R * block, A], and keys [B, K, S, A].
    queries = q_sort.sort(q).reshape(-1, block, heads, width).swapaxes(1, 2)
    queries = queries.reshape(-1, groups, heads // groups * block, width)
    keys, values = (k_sort.sort(x).swapaxes(1, 2) for x in (k, v))
    spans = _spans(codes, block)
    first, last, own = (a.reshape(-1, block) for a in codes[:3])
    flat = Codes(first, last, own, codes.code)
    out = _attend(queries, keys, values, flat, spans)
    out = out.reshape(batch, -1, heads, block, width).swapaxes(2, 3).reshape(batch, -1, heads, width)
    return q_sort.unsort(out[:, :q_len])


class Spans(NamedTuple):
    """Where the keys of each block of queries lie, int32 [B * blocks]; blocks are counted over all rows.

    Attributes:
      start: the first key of the block's range, in its row.
      order: the blocks, by the length that their ranges are rounded up to.
      bounds: [lengths + 1] where in `order` the blocks of each length begin.
    """

    start: jax.Array
    order: jax.Array
    bounds: jax.Array


def _lengths(keys: int, block: int) -> list[int]:
    """Lengths that ranges are rounded up to: 1, 2, 3, 4, 6, 8, 12, ... blocks, at most all keys."""
    counts = sorted({1, *(2**n for n in range(1, 24)), *(3 * 2**n for n in range(23))})
    return [*(count * block for count in counts if count * block < keys), keys]


def _spans(codes: Codes, block: int) -> Spans:
    """Finds the range of each block of queries."""
    keys = codes.code.shape[1]
    needed = meeting_blocks(codes, block, 1)
    first = jnp.argmax(needed, axis=2)
    length = jnp.where(needed.any(axis=2), keys - jnp.argmax(needed[:, :, ::-1], axis=2) - first, 0).reshape(-1)
    lengths = jnp.asarray(_lengths(keys, block))
    kind = jnp.searchsorted(lengths, length)
    # A slice that would reach over the end begins earlier.
    start = jnp.minimum(first.reshape(-1), keys - lengths[kind])
    order = jnp.argsort(kind)
    return Spans(start, order, jnp.searchsorted(kind[order], jnp.arange(len(lengths) + 1)))


def _place_code(layout: TokenLayout) -> jax.Array:
    """One number for the place of a token in the order of attention.

    Only speed depends on it: documents beyond the first 2,047 of a row would lie in disorder.
    """
    place = layout.document * 2**20 + jnp.where(layout.mode == NOISE, 2**19 + layout.split, layout.order)
    return jnp.where(layout.document == PADDING, 2**31 - 1, place)


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
        return jnp.pad(permute(x, self._places, self._back), ((0, 0), (0, self._extra), (0, 0), (0, 0)))

    def unsort(self, x: jax.Array) -> jax.Array:
        """Brings sorted [B, S, H, A], without filler, back."""
        return permute(x, self._back, self._places)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix products of a batch, float32, summed over the axes named."""
    numbers = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


class _Part(NamedTuple):
    """What the loop for one length reads for block i of queries."""

    row: jax.Array
    start: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    logits: jax.Array
    """Scaled and masked, float32 [K, R q, k]."""


def _read(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, spans: Spans, length: int, i: jax.Array) -> _Part:
    row, start = i // (len(q) // len(k)), spans.start[i]
    qb = q[i]
    kb, vb = (lax.dynamic_slice(x, (row, 0, start, 0), (1, x.shape[1], length, x.shape[3]))[0] for x in (k, v))
    code = lax.dynamic_slice(codes.code, (row, start), (1, length))
    first, last, own = (a[i][:, None] for a in codes[:3])
    mask = ((first <= code) & (code < last)) | (code == own)
    logits = _dot(qb, kb, 2, 2) * q.shape[-1] ** -0.5
    logits = jnp.where(mask, logits.reshape(len(qb), -1, *mask.shape), _MASKED).reshape(logits.shape)
    return _Part(row, start, qb, kb, vb, logits)


def _over_blocks(lengths: list[int], spans: Spans, step: Callable[..., Any], carry: Any) -> Any:
    """Runs step(length, i, carry) for every block i of queries, with the length of its range."""
    for number, length in enumerate(lengths):

        def body(n: jax.Array, carry: Any, length: int = length) -> Any:
            return step(length, spans.order[n], carry)

        carry = lax.fori_loop(spans.bounds[number], spans.bounds[number + 1], body, carry)
    return carry


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, spans: Spans) -> jax.Array:
    return _forward(q, k, v, codes, spans)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, codes: Codes, spans: Spans) -> tuple[jax.Array, tuple[Any, ...]]:
    def step(length: int, i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = _read(q, k, v, codes, spans, length, i)
        peak = jnp.maximum(part.logits.max(-1), _START)
        weights = jnp.exp(part.logits - peak[..., None])
        total = jnp.maximum(weights.sum(-1), jnp.finfo(jnp.float32).tiny)
        out = _dot(weights.astype(v.dtype), part.v, 2, 1) / total[..., None]
        new = out.astype(q.dtype), peak + jnp.log(total)
        return tuple(lax.dynamic_update_index_in_dim(a, x, i, 0) for a, x in zip(carry, new, strict=True))

    block = codes.first.shape[1]
    start = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32)
    out, log_total = _over_blocks(_lengths(k.shape[2], block), spans, step, start)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    log_total = checkpoint_name(log_total, ATTENTION_OUTPUT)
    return out, (q, k, v, codes, spans, out, log_total)


def _backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, codes, spans, out, log_total = saved
    scale = q.shape[-1] ** -0.5
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    # Gradients of keys and values are formed as [B, K, A, S]: from [A, R q] x [R q, k] no product needs a transposition
    # of the weights.
    q_turned, grad_turned = q.swapaxes(2, 3), grad.swapaxes(2, 3)

    def step(length: int, i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slopes_of, *to_keys = carry
        part, gb = _read(q, k, v, codes, spans, length, i), slopes_of[i]
        weights = jnp.exp(part.logits - log_total[i][..., None])
        slopes = weights * (_dot(gb, part.v, 2, 2) - delta[i][..., None]) * scale
        dq = _dot(slopes.astype(k.dtype), part.k, 2, 1).astype(q.dtype)
        adds = _dot(q_turned[i], slopes.astype(q.dtype), 2, 1), _dot(grad_turned[i], weights.astype(grad.dtype), 2, 1)
        at = (part.row, 0, 0, part.start)
        for number, add in enumerate(adds):
            old = lax.dynamic_slice(to_keys[number], at, (1, *add.shape))
            to_keys[number] = lax.dynamic_update_slice(to_keys[number], old + add, at)
        return lax.dynamic_update_index_in_dim(slopes_of, dq, i, 0), *to_keys

    # A block's gradient of queries takes the place of what came from above, which no other block reads.
    turned = (*k.shape[:2], k.shape[3], k.shape[2])
    start = grad, *(jnp.zeros(turned, jnp.float32) for _ in range(2))
    dq, *to_keys = _over_blocks(_lengths(k.shape[2], codes.first.shape[1]), spans, step, start)
    return dq, *(g.swapaxes(2, 3).astype(k.dtype) for g in to_keys), None, None


_attend.defvjp(_forward, _backward)
