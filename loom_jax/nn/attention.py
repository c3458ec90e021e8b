"""Attention backends: `attend(q, k, v, q_layout, k_layout)`. Who may see whom comes from the layout alone.

All backends take q [B, Q, H, A], k and v [B, N, K, A] with H a multiple of K (query head j uses key head j // (H/K)),
and layouts [B, Q] and [B, N]; they return [B, Q, H, A]. Tokens of padding documents get finite output and gradients,
and nobody sees them. Logits and softmax are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loom_jax.document import PADDING, TokenLayout, may_attend

Attend = Callable[[jax.Array, jax.Array, jax.Array, TokenLayout, TokenLayout], jax.Array]

_Online = tuple[jax.Array, jax.Array, jax.Array]
"""What the online softmax carries: the highest logit so far, the sum of weights, the weighted sum of values."""

_MASKED = -1e30
"""Logit of a forbidden pair: finite, so that rows without any key stay finite."""


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout
) -> jax.Array:
    """Computes all pairs at once, [B, H, Q, N] in memory: for short sequences and as the measure of the others."""
    mask = may_attend(q_layout, k_layout)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attention_weights(q: jax.Array, k: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
    """Returns the weights themselves, float32 [B, H, Q, N]: to look at them. Rows of padding are 0."""
    mask = may_attend(q_layout, k_layout)
    logits = _logits(_grouped(q, k.shape[2]), k, mask)
    weights = jnp.where(mask[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
    return weights.reshape(q.shape[0], q.shape[2], *weights.shape[-2:])


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_layout: TokenLayout,
    k_layout: TokenLayout,
    block_size: int = 512,
) -> jax.Array:
    """Computes attention over blocks with an online softmax: memory linear in the length, forward and backward.

    A pair of blocks in which no query may attend to any key is skipped, so documents that lie together in a pack cost
    what they would cost alone.
    """
    q_len, k_len = q.shape[1], k.shape[1]
    q_block, k_block = min(block_size, q_len), min(block_size, k_len)
    q, q_layout = _pad(q, q_layout, q_block)
    k, padded_layout = _pad(k, k_layout, k_block)
    v, _ = _pad(v, k_layout, k_block)
    return _blockwise(q, k, v, q_layout, padded_layout, (q_block, k_block))[:, :q_len]


def _pad(x: jax.Array, layout: TokenLayout, block: int) -> tuple[jax.Array, TokenLayout]:
    """Fills x [B, S, ...] and its layout up to a multiple of `block` with padding tokens."""
    extra = -x.shape[1] % block
    if not extra:
        return x, layout
    x = jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return x, TokenLayout(*(jnp.pad(a, ((0, 0), (0, extra)), constant_values=PADDING) for a in layout))


def _blocks(x: Any, block: int) -> Any:
    """[B, n * block, ...] -> [n, B, block, ...], for every array of a pytree."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, block, *a.shape[2:]), 1, 0), x)


def _unblocks(x: jax.Array) -> jax.Array:
    """[n, B, block, ...] -> [B, n * block, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _grouped(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """[..., H, A] -> [..., K, H/K, A]."""
    return q.reshape(*q.shape[:-2], num_kv_heads, -1, q.shape[-1])


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled and masked logits, float32 [B, K, R, q, k]."""
    logits = jnp.einsum("bqkra,bnka->bkrqn", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], logits * q.shape[-1] ** -0.5, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout, sizes: tuple[int, int]
) -> jax.Array:
    return _blockwise_forward(q, k, v, q_layout, k_layout, sizes)[0]


def _blockwise_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout, sizes: tuple[int, int]
) -> tuple[jax.Array, tuple[Any, ...]]:
    num_kv_heads = k.shape[2]
    keys = _blocks((k, v, k_layout), sizes[1])

    def one_query_block(block: tuple[jax.Array, TokenLayout]) -> tuple[jax.Array, jax.Array]:
        qb, ql = block
        batch, length, groups, rep, width = qb.shape

        def step(carry: _Online, key_block: tuple[Any, ...]) -> tuple[_Online, None]:
            kb, vb, kl = key_block
            mask = may_attend(ql, kl)

            def attend(carry: _Online) -> _Online:
                peak, total, out = carry
                logits = _logits(qb, kb, mask)
                new_peak = jnp.maximum(peak, logits.max(-1))
                weights = jnp.where(mask[:, None, None], jnp.exp(logits - new_peak[..., None]), 0.0)
                shrink = jnp.exp(peak - new_peak)
                add = jnp.einsum("bkrqn,bnka->bkrqa", weights.astype(vb.dtype), vb, preferred_element_type=jnp.float32)
                return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + add

            return jax.lax.cond(mask.any(), attend, lambda c: c, carry), None

        rows = (batch, groups, rep, length)
        start = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, width)))
        (peak, total, out), _ = jax.lax.scan(step, start, keys)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out = jnp.moveaxis(out / total[..., None], 3, 1)
        return out.astype(q.dtype), peak + jnp.log(total)

    out, log_total = jax.lax.map(one_query_block, _blocks((_grouped(q, num_kv_heads), q_layout), sizes[0]))
    out = _unblocks(out).reshape(q.shape)
    return out, (q, k, v, q_layout, k_layout, out, log_total)


def _blockwise_backward(sizes: tuple[int, int], saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    """Recomputes the weights of each pair of blocks from the saved log-sum-exp (the FlashAttention-2 backward pass)."""
    q, k, v, q_layout, k_layout, out, log_total = saved
    num_kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    per_query = _blocks(tuple(_grouped(a, num_kv_heads) for a in (q, grad, delta)) + (q_layout,), sizes[0])
    queries = (*per_query, log_total)

    def one_key_block(dq: jax.Array, key_block: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kb, vb, kl = key_block

        def step(
            carry: tuple[jax.Array, jax.Array], block: tuple[Any, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            qb, gb, db, ql, lse = block
            mask = may_attend(ql, kl)

            def attend(dk: jax.Array, dv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                weights = jnp.where(mask[:, None, None], jnp.exp(_logits(qb, kb, mask) - lse[..., None]), 0.0)
                dv += jnp.einsum("bkrqn,bqkra->bnka", weights, gb.astype(jnp.float32))
                dw = jnp.einsum("bqkra,bnka->bkrqn", gb, vb, preferred_element_type=jnp.float32)
                ds = weights * (dw - jnp.transpose(db[..., 0], (0, 2, 3, 1))[..., None]) * scale
                dk += jnp.einsum("bkrqn,bqkra->bnka", ds, qb.astype(jnp.float32))
                return dk, dv, jnp.einsum("bkrqn,bnka->bqkra", ds, kb.astype(jnp.float32))

            def skip(dk: jax.Array, dv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                return dk, dv, jnp.zeros(qb.shape, jnp.float32)

            dk, dv, dq_block = jax.lax.cond(mask.any(), attend, skip, *carry)
            return (dk, dv), dq_block

        zeros = jnp.zeros(kb.shape, jnp.float32)
        (dk, dv), dq_blocks = jax.lax.scan(step, (zeros, zeros), queries)
        return dq + dq_blocks, (dk, dv)

    start = jnp.zeros(per_query[0].shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(one_key_block, start, _blocks((k, v, k_layout), sizes[1]))
    dq = _unblocks(dq).reshape(q.shape).astype(q.dtype)
    return dq, _unblocks(dk).astype(k.dtype), _unblocks(dv).astype(v.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)

ATTENTION_OUTPUT = "attention_output"
"""Name by which a remat policy may keep what attention computed."""

_DENSE_LIMIT = 2048 * 2048
"""Most (query, key) pairs of a row that are still computed at once: 16 MiB of float32 logits a head."""


def auto_attention(q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
    """Dense for few pairs of tokens (short packs, or one new token over a long context), blockwise beyond."""
    attend = dense_attention if q.shape[1] * k.shape[1] <= _DENSE_LIMIT else blockwise_attention
    return attend(q, k, v, q_layout, k_layout)
