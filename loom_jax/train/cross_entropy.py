"""The cross-entropy of text, without ever holding the logits of the whole vocabulary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from loom_jax.document import NO_TOKEN
from loom_jax.nn import linear_dot, permute

_Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Of each token: the highest logit so far, the sum of exponentials, the logit of the label."""

TOKEN_BLOCKS = 4
"""Into so many blocks a row is cut: enough for most rows to leave some out. At worst a step takes them all."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns -log p(label), float32 [...]; logits [..., vocab], labels [...], 0 where the label is NO_TOKEN."""
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels == NO_TOKEN, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked)


def vocabulary_chunks(vocab: int, chunk: int) -> int:
    """Returns a number of parts of a vocabulary that have at most `chunk` columns each.

    It divides the vocabulary where a number of up to twice the least one does; else the last columns are filler.
    """
    least = -(-vocab // chunk)
    return next((n for n in range(least, 2 * least + 1) if vocab % n == 0), least)


def chunked_cross_entropy(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, chunk: int) -> jax.Array:
    """Returns `cross_entropy` of hidden [B, U, D] @ kernel [D, vocab] with at most `chunk` columns of logits at once.

    Then tokens without a label cost little: those with one are brought together in as few blocks of tokens as hold
    them, and other blocks are left out. The backward pass computes each part's logits anew. Part i of n holds the
    columns i, i + n, i + 2n, ..., so that every device of a sharded vocabulary has its share of every part.
    """
    vocab = kernel.shape[1]
    parts = vocabulary_chunks(vocab, chunk)
    if parts == 1:
        logits = linear_dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return cross_entropy(logits, labels)
    width = -(-vocab // parts)
    filled = jnp.pad(kernel.astype(hidden.dtype), ((0, 0), (0, width * parts - vocab)))
    columns = filled.reshape(kernel.shape[0], width, parts).transpose(2, 0, 1)
    order = jnp.argsort(labels == NO_TOKEN, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    labels = jnp.take_along_axis(labels, order, axis=1)
    hidden, labels = _blocks(permute(hidden, order, back), 0), _blocks(labels, NO_TOKEN)
    ce = _labelled_cross_entropy(hidden, columns, labels, vocab)
    return permute(jnp.moveaxis(ce, 0, 1).reshape(len(order), -1)[:, : order.shape[1]], back, order)


def _blocks(x: jax.Array, filler: int) -> jax.Array:
    """[B, U, ...] -> [n, B, U / n, ...], filled up."""
    size = -(-x.shape[1] // TOKEN_BLOCKS)
    extra = [(0, 0), (0, size * TOKEN_BLOCKS - x.shape[1]), *((0, 0),) * (x.ndim - 2)]
    x = jnp.pad(x, extra, constant_values=filler)
    return jnp.moveaxis(x.reshape(len(x), TOKEN_BLOCKS, size, *x.shape[2:]), 1, 0)


def _part_logits(hidden: jax.Array, weights: jax.Array, number: jax.Array, parts: int, vocab: int) -> jax.Array:
    """Logits of a part of the vocabulary, float32 [B, u, width]; those of filler weigh nothing."""
    logits = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(weights.shape[1]) * parts + number < vocab, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _labelled_cross_entropy(hidden: jax.Array, columns: jax.Array, labels: jax.Array, vocab: int) -> jax.Array:
    """hidden [n, B, u, D], columns [parts, D, width], labels [n, B, u] -> [n, B, u]; blocks with labels come first."""
    return _labelled_forward(hidden, columns, labels, vocab)[0]


def _labelled_forward(
    hidden: jax.Array, columns: jax.Array, labels: jax.Array, vocab: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    parts = len(columns)

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, own = hidden[i], labels[i]

        def step(carry: _Sums, part: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
            peak, total, picked = carry
            number, weights = part
            logits = _part_logits(tokens, weights, number, parts, vocab)
            new_peak = jnp.maximum(peak, logits.max(axis=-1))
            total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[..., None]).sum(axis=-1)
            value = jnp.take_along_axis(logits, jnp.maximum(own // parts, 0)[..., None], axis=-1)[..., 0]
            return (new_peak, total, picked + jnp.where(own % parts == number, value, 0.0)), None

        zero = jnp.zeros(own.shape, jnp.float32)
        (peak, total, picked), _ = jax.lax.scan(step, (zero - jnp.inf, zero, zero), (jnp.arange(parts), columns))
        log_total = peak + jnp.log(total)
        found = jnp.where(own == NO_TOKEN, 0.0, log_total - picked), log_total
        return carry[0].at[i].set(found[0]), carry[1].at[i].set(found[1])

    zeros = jnp.zeros(labels.shape, jnp.float32)
    ce, log_total = jax.lax.fori_loop(0, _labelled_blocks(labels), block, (zeros, zeros))
    return ce, (hidden, columns, labels, log_total)


def _labelled_blocks(labels: jax.Array) -> jax.Array:
    return (labels != NO_TOKEN).any(axis=(1, 2)).sum()


def _labelled_backward(vocab: int, saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    hidden, columns, labels, log_total = saved
    parts, width = len(columns), columns.shape[2]

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, own, total = hidden[i], labels[i][..., None], log_total[i][..., None]
        above = jnp.where(own == NO_TOKEN, 0.0, grad[i][..., None])

        def step(slopes: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            number, weights, sums = part
            logits = _part_logits(tokens, weights, number, parts, vocab)
            picked = jnp.arange(width) * parts + number == own
            slope = ((jnp.exp(logits - total) - picked) * above).astype(tokens.dtype)
            slopes += jnp.einsum("buv,dv->bud", slope, weights, preferred_element_type=jnp.float32)
            add = jnp.einsum("bud,buv->dv", tokens, slope, preferred_element_type=jnp.float32)
            return slopes, (sums + add).astype(sums.dtype)

        start = jnp.zeros(tokens.shape, jnp.float32)
        slopes, sums = jax.lax.scan(step, start, (jnp.arange(parts), columns, carry[1]))
        return carry[0].at[i].set(slopes.astype(hidden.dtype)), sums

    zeros = jnp.zeros_like(hidden), jnp.zeros_like(columns)
    return *jax.lax.fori_loop(0, _labelled_blocks(labels), block, zeros), None


_labelled_cross_entropy.defvjp(_labelled_forward, _labelled_backward)
