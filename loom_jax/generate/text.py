"""Text decoding as one compiled loop on the device: greedy, temperature, top-p; each row stops by itself."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loom_jax.data import Streams
from loom_jax.document import CAUSAL, NO_TOKEN, PADDING, SpecialIds, TokenLayout
from loom_jax.generate.context import BACKEND, Context, extend_context
from loom_jax.models import Backend, LoomModel


class TextControls(NamedTuple):
    """How tokens are chosen: float32 scalars, so that changing them compiles nothing."""

    temperature: jax.Array
    """0 takes the most likely token."""
    top_p: jax.Array
    """Keeps the most likely tokens whose probability adds up to this; 1 keeps all."""


class DecodedText(NamedTuple):
    """Tokens int32 [B, T] without begin and end marks (NO_TOKEN beyond the end), and their number [B].

    `finished` [B]: whether the row ended by itself. `context` holds the begin mark and the tokens, but for the last one
    of a row that did not finish: nothing was predicted from it.
    """

    tokens: jax.Array
    length: jax.Array
    finished: jax.Array
    context: Context


class _Loop(NamedTuple):
    context: Context
    last: jax.Array
    tokens: jax.Array
    length: jax.Array
    finished: jax.Array
    step: jax.Array


def decode_text(
    model: LoomModel,
    context: Context,
    keys: jax.Array,
    controls: TextControls,
    max_new_tokens: jax.Array,
    special: SpecialIds,
    vocabulary: int,
    buffer: int,
    backend: Backend = BACKEND,
) -> DecodedText:
    """Writes text after a context until the end mark or `max_new_tokens`; every predicted token is returned.

    Args:
      keys: typed random keys [B], one a row, so that a row's text does not depend on its batch mates.
      max_new_tokens: int32 scalar, at most `buffer`.
      vocabulary: ids from here on are padding rows of the embedding table and are never chosen.
      buffer: static number of tokens to make room for; the context needs as many free slots.
    """
    rows = context.length.shape[0]
    start = _Loop(
        context=context._replace(split=context.split + 1),
        last=jnp.full((rows,), special.bos, jnp.int32),
        tokens=jnp.full((rows, buffer), NO_TOKEN, jnp.int32),
        length=jnp.zeros((rows,), jnp.int32),
        finished=jnp.zeros((rows,), bool),
        step=jnp.int32(0),
    )

    def more(loop: _Loop) -> jax.Array:
        return (loop.step < max_new_tokens) & ~loop.finished.all()

    def body(loop: _Loop) -> _Loop:
        streams = _one_token(loop, context.split, model)
        latents = jnp.zeros((rows, 0, model.config.latent_dim), jnp.float32)
        ahead = jnp.where(loop.finished, 0, 1)
        position, after = loop.context.position + ahead, loop.context.split
        extended, decoded = extend_context(model, loop.context, streams, latents, position, after, backend)
        logits = model.logits(decoded.und[:, 0])
        token = choose_tokens(logits.at[:, vocabulary:].set(-jnp.inf), keys, loop.step, controls)
        ends = token == special.eos
        keep = ~loop.finished & ~ends
        return _Loop(
            context=extended,
            last=jnp.where(keep, token, loop.last),
            tokens=loop.tokens.at[:, loop.step].set(jnp.where(keep, token, NO_TOKEN)),
            length=loop.length + keep,
            finished=loop.finished | ends,
            step=loop.step + 1,
        )

    loop = jax.lax.while_loop(more, body, start)
    return DecodedText(loop.tokens, loop.length, loop.finished, loop.context)


def _one_token(loop: _Loop, split: jax.Array, model: LoomModel) -> Streams:
    """The und stream of one token a row; rows that have finished feed filler."""
    context = loop.context
    document = jnp.where(loop.finished, PADDING, 0)
    column = [document, split, jnp.full_like(split, CAUSAL), context.length, context.position]
    rows = split.shape[0]
    empty = jnp.zeros((rows, 0), jnp.int32)
    return Streams(
        und=TokenLayout(*(a[:, None] for a in column)),
        token_ids=loop.last[:, None],
        vit_index=jnp.full((rows, 1), NO_TOKEN, jnp.int32),
        gen=TokenLayout(*[empty] * 5),
        latent_positions=empty,
        patches=jnp.zeros((rows, 0, model.config.vit.patch_dim), jnp.float32),
        vit_positions=empty,
        vit_segments=empty,
    )


def choose_tokens(logits: jax.Array, keys: jax.Array, step: jax.Array, controls: TextControls) -> jax.Array:
    """Chooses one token a row from float32 logits [B, vocab]: the best at temperature 0, else a draw within top-p."""

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(controls.temperature, 1e-6)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(step_keys, keep_top_p(scaled, controls.top_p)).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(controls.temperature > 0, draw, lambda: greedy)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf all logits [B, vocab] but the fewest most likely whose probabilities reach `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
