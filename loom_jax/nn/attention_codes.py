"""The rule of loom_jax.document.mask as numbers, for attention that goes block by block.

A key that is not noise has the code `document * 2^20 + order`: what a query sees of such keys is one range of codes,
from the first token of its document to itself, or to the end of its own split if that is full. A key that is noise has
a negative code that belongs to its split, and a noise query sees that one code besides. So a pair takes three
comparisons, however the tokens are sorted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loom_jax.document import CAUSAL, NOISE, PADDING, TokenLayout

NOBODY = -(2**31)
"""The code of no key: what a query that is no noise has for its own."""

_LAST = 2**31 - 1
_ORDERS = 2**20
_SPLITS = 2**16


class Codes(NamedTuple):
    """What a query sees: keys with first <= code < last, or code == own. int32 [B, Q] and, for `code`, [B, N]."""

    first: jax.Array
    last: jax.Array
    own: jax.Array
    code: jax.Array


def attention_codes(q_layout: TokenLayout, k_layout: TokenLayout) -> Codes:
    """Returns the numbers that stand for the rule. Documents have fewer than 2^20 tokens and 2^16 splits."""
    # One number for a split: the comparison below is made for every pair.
    q_split = jnp.where(q_layout.mode == CAUSAL, NOBODY, q_layout.document * _SPLITS + q_layout.split)
    k_split = k_layout.document * _SPLITS + k_layout.split
    in_split = jnp.where(q_split[:, :, None] == k_split[:, None, :], k_layout.order[:, None, :], -1)
    reach = jnp.maximum(q_layout.order, in_split.max(axis=2))

    def noise_code(layout: TokenLayout) -> jax.Array:
        return -2 - layout.document * _SPLITS - layout.split

    first = q_layout.document * _ORDERS
    held = q_layout.document != PADDING
    code = jnp.where(k_layout.mode == NOISE, noise_code(k_layout), k_layout.document * _ORDERS + k_layout.order)
    return Codes(
        first=jnp.where(held, first, 0),
        last=jnp.where(held, first + reach + 1, 0),
        own=jnp.where(held & (q_layout.mode == NOISE), noise_code(q_layout), NOBODY),
        code=jnp.where(k_layout.document == PADDING, -1, code),
    )


def meeting_blocks(codes: Codes, q_block: int, k_block: int) -> jax.Array:
    """Returns which blocks of queries may see something in which blocks of keys, bool [B, nq, nk].

    Blocks are judged by the ranges of their codes, which is enough for documents that lie together.
    """
    shape = codes.first.shape[0], -1
    first, last, own = (a.reshape(*shape, q_block) for a in codes[:3])
    code = codes.code.reshape(*shape, k_block)
    seeing, noise = last > first, code < -1
    first, last = jnp.where(seeing, first, _LAST).min(axis=2), last.max(axis=2)
    own_low, own_high = jnp.where(own == NOBODY, _LAST, own).min(axis=2), own.max(axis=2)
    low, high = jnp.where(code >= 0, code, _LAST).min(axis=2), code.max(axis=2)
    noise_low, noise_high = jnp.where(noise, code, _LAST).min(axis=2), jnp.where(noise, code, NOBODY).max(axis=2)

    def meet(q_range: tuple[jax.Array, jax.Array], k_range: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (q_range[0][:, :, None] <= k_range[1][:, None]) & (k_range[0][:, None] <= q_range[1][:, :, None])

    return meet((first, last - 1), (low, high)) | meet((own_low, own_high), (noise_low, noise_high))
