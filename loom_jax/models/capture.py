"""Looking into chosen layers of the decoder: their hidden states and their attention, which cost nothing unasked."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loom_jax.core import ConfigError
from loom_jax.document import TokenLayout
from loom_jax.nn import Attend, attention_weights


class Capture(NamedTuple):
    """Numbers of layers, from 0, whose insides are wanted; hashable, for use as a static argument.

    Example:
      ```python
      captured = model(streams, latents, timesteps, capture=Capture(hidden=(0, 27), attention=(13,))).captured
      captured.hidden[1][-1]   # gen stream after layer 27, [B, G, D]
      captured.attention[0]    # of layer 13, [B, H, U + G, N + U + G]
      ```
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()


class Captured(NamedTuple):
    """What was asked for, in the order in which the layers were named.

    `hidden`: outputs of layers, und [n, B, U, D] and gen [n, B, G, D]. `attention` float32 [m, B, H, U + G, N + U + G]:
    the weight that each new token (und before gen) gives to each of N past and the new ones; rows sum to 1, but those
    of padding are 0. It is computed densely beside the backend's own: 4 bytes a pair, head and layer.
    """

    hidden: tuple[jax.Array, jax.Array]
    attention: jax.Array


def layer_slots(capture: Capture, num_layers: int) -> tuple[jax.Array, jax.Array]:
    """Returns for each layer, int32 [L], where its hidden states and its attention go; past the end if nowhere.

    Raises:
      ConfigError: a layer is not there, or is named twice.
    """
    tables = []
    for name, chosen in capture._asdict().items():
        wrong = [layer for layer in chosen if not 0 <= layer < num_layers]
        if wrong or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"capture {name}={chosen}: expected different layers from 0 to {num_layers - 1}, each named once"
            )
        table = np.full(num_layers, len(chosen), np.int32)
        table[list(chosen)] = np.arange(len(chosen))
        tables.append(jnp.asarray(table))
    return tables[0], tables[1]


def no_captures(capture: Capture, num_heads: int, streams: tuple[jax.Array, jax.Array], past: int) -> Captured:
    """Returns room for what is to be captured of streams [B, U, D] and [B, G, D] after `past` tokens."""
    new = sum(stream.shape[1] for stream in streams)
    und, gen = (jnp.zeros((len(capture.hidden), *stream.shape), stream.dtype) for stream in streams)
    shape = (len(capture.attention), streams[0].shape[0], num_heads, new, past + new)
    return Captured((und, gen), jnp.zeros(shape, jnp.float32))


class Watched:
    """The attention of one layer that keeps what is asked of the layer in `captured`."""

    def __init__(self, attend: Attend, captured: Captured, slots: tuple[jax.Array, jax.Array]):
        self.captured = captured
        self._attend, self._slots = attend, slots

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout
    ) -> jax.Array:
        kept, slot = self.captured.attention, self._slots[1]
        if kept.shape[0]:
            kept = jax.lax.cond(
                slot < kept.shape[0],
                lambda: kept.at[slot].set(attention_weights(q, k, q_layout, k_layout)),
                lambda: kept,
            )
            self.captured = self.captured._replace(attention=kept)
        return self._attend(q, k, v, q_layout, k_layout)

    def keep_hidden(self, streams: tuple[jax.Array, jax.Array]) -> None:
        """Keeps the layer's output, if it was asked for: a slot past the end is dropped."""
        hidden, slot = self.captured.hidden, self._slots[0]
        if hidden[0].shape[0]:
            und, gen = (kept.at[slot].set(stream, mode="drop") for kept, stream in zip(hidden, streams, strict=True))
            self.captured = self.captured._replace(hidden=(und, gen))
