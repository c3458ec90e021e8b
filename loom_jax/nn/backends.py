"""Attention backends by name, and the one that suits a kind of device."""

from __future__ import annotations

import jax

from loom_jax.core import ConfigError
from loom_jax.document import TokenLayout
from loom_jax.nn.attention import Attend, auto_attention, blockwise_attention, dense_attention
from loom_jax.nn.document_attention import document_attention
from loom_jax.nn.gpu_attention import gpu_attention
from loom_jax.nn.tpu_attention import tpu_attention

ATTENTION_BACKENDS: dict[str, Attend] = {
    "auto": auto_attention,
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "document": document_attention,
    "gpu": gpu_attention,
    "tpu": tpu_attention,
}
"""Backends by the name that configurations use; `auto` is what `choose_attention` makes of it."""


_SMALL = 384 * 384
"""Most (query, key) pairs of a row for which all of them at once beat a loop over blocks on a CPU."""


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
    """Dense for short rows, and for few queries, as when text is written; by documents beyond."""
    few = q.shape[1] < 32 or q.shape[1] * k.shape[1] <= _SMALL
    return (dense_attention if few else document_attention)(q, k, v, q_layout, k_layout)


def choose_attention(name: str, platform: str) -> Attend:
    """Returns the backend of a name, for devices of a platform (`cpu`, `gpu`, `tpu`).

    Raises:
      ConfigError: there is no such backend.
    """
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention={name!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    fastest: dict[str, Attend] = {"cpu": cpu_attention, "gpu": gpu_attention, "tpu": tpu_attention}
    return fastest.get(platform, auto_attention) if name == "auto" else ATTENTION_BACKENDS[name]
