"""The attention rule: who may attend to whom. Its single statement: every attention backend is tested against it."""

from __future__ import annotations

from typing import Any, NamedTuple

CAUSAL, FULL, NOISE = 0, 1, 2
"""Attention modes of a split: text is causal, `vit` and `clean` images are full, `noisy` images are noise."""

PADDING = -1
"""The document number of tokens that are only there to fill an array. They attend to nothing and nobody sees them."""


class TokenLayout(NamedTuple):
    """What attention and rotary positions need to know of every token: int32 arrays of one shape, numpy or jax.

    A NamedTuple, so jax takes it as a pytree although nothing here imports jax.
    """

    document: Any
    """Number of the document within its row; PADDING for filler."""
    split: Any
    """Number of the split (the token run of one segment) within its document."""
    mode: Any
    """CAUSAL, FULL or NOISE."""
    order: Any
    """Place of the token in its document, counted from 0 over all tokens of both streams."""
    position: Any
    """Rotary position. All tokens of an image share one."""


def may_attend(q: TokenLayout, k: TokenLayout) -> Any:
    """Returns the boolean mask of shape [..., Q, K]: True where query token q may attend to key token k.

    Args:
      q: layout of the queries, arrays [..., Q].
      k: layout of the keys, arrays [..., K].

    Source: the per-sample masks of the original (spec, section 3): earlier tokens and one's own full or noise split,
    but never another split that holds noise.
    """
    qd, qs, qm, qo, _ = (a[..., :, None] for a in q)
    kd, ks, km, ko, _ = (a[..., None, :] for a in k)
    same_split = qs == ks
    reachable = (qo >= ko) | (same_split & (qm != CAUSAL))
    hidden_noise = (km == NOISE) & ~same_split
    return (qd == kd) & (qd != PADDING) & reachable & ~hidden_noise
