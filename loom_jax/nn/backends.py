"""Attention backends by name, and the one that suits a kind of device."""

from __future__ import annotations

from loom_jax.core import ConfigError
from loom_jax.nn.attention import Attend, auto_attention, blockwise_attention, dense_attention
from loom_jax.nn.tpu_attention import tpu_attention

ATTENTION_BACKENDS: dict[str, Attend] = {
    "auto": auto_attention,
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "tpu": tpu_attention,
}
"""Backends by the name that configurations use; `auto` is what `choose_attention` makes of it."""


def choose_attention(name: str, platform: str) -> Attend:
    """Returns the backend of a name, for devices of a platform (`cpu`, `gpu`, `tpu`).

    Raises:
      ConfigError: there is no such backend.
    """
    if name not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention={name!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    return tpu_attention if (name, platform) == ("auto", "tpu") else ATTENTION_BACKENDS[name]
