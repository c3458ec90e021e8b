"""What a Python user imports: `load`, then `generate`; `convert` to get there.

from loom_jax import api

api.convert("BAGEL-7B-MoT", "bagel_7b")
generator = api.load("bagel_7b")
[result] = generator.generate([api.Request(("A small boat on a quiet lake",))])
result.image.save("boat.png")

`interleave(generator, [InterleavedRequest(...)])` makes sequences of texts and pictures, for which the tokenizer needs
Loom's tokens: `load("bagel_7b", tokens=LOOM_TOKENS)`.

`observe(generator, Request(...), Capture(hidden=(0, 27), attention=(13,)))` looks into layers at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from loom_jax.converters.bagel import from_orbax as export
from loom_jax.converters.bagel import to_orbax as convert
from loom_jax.core import ConfigError, LoomConfig, TokenizerError
from loom_jax.document import LOOM_TOKENS, HistoryPolicy, Tokenizer, make_encoder
from loom_jax.generate import (
    LOOM_SETTINGS,
    Done,
    Engine,
    FrameMade,
    Generator,
    ImageSettings,
    InterleavedRequest,
    PlanWritten,
    Preview,
    Request,
    RequestFailed,
    Result,
    TextSettings,
    TurnStarted,
    interleave,
    observe,
)
from loom_jax.models import QUANTIZATIONS, Backend, Capture, load_folder, quantize_decoder
from loom_jax.nn import choose_attention
from loom_jax.parallel import make_constrain, make_mesh, shard_attend

__all__ = [
    "LOOM_SETTINGS",
    "LOOM_TOKENS",
    "Capture",
    "Done",
    "FrameMade",
    "HistoryPolicy",
    "ImageSettings",
    "InterleavedRequest",
    "PlanWritten",
    "Preview",
    "Request",
    "RequestFailed",
    "Result",
    "TextSettings",
    "TurnStarted",
    "convert",
    "export",
    "interleave",
    "load",
    "observe",
]


def load(
    folder: str | Path,
    *,
    preset: str = "single",
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    attention: str = "auto",
    quantize: str | None = None,
    tokens: Sequence[str] = (),
) -> Generator:
    """Loads a converted folder, ready to generate.

    Args:
      folder: made by `convert` (or `loom convert`).
      preset: how the weights lie on the devices, see loom_jax.parallel; `single` is one device.
      mesh: the devices; by default `make_mesh(preset)`.
      dtype: of weights and computation; by default bfloat16 on accelerators and float32 on CPU.
      attention: a key of loom_jax.nn.ATTENTION_BACKENDS.
      quantize: `int8` keeps the decoder's kernels as int8 (see loom_jax.models.quantize_decoder); they are loaded as
        `dtype` and then turned one by one.
      tokens: that the tokenizer must have, such as LOOM_TOKENS; those that it lacks get the ids after its last one,
        with embeddings that this checkpoint has not learned.

    Raises:
      CheckpointError: the folder is not a converted model, or is broken.
      TokenizerError: the embedding table has no rows for `tokens`.
      ConfigError: `attention`, `preset` or `quantize` is not known.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantize={quantize!r} is not one of {', '.join(QUANTIZATIONS)}")
    mesh = mesh or make_mesh(preset)
    platform = mesh.devices.flat[0].platform
    attend = shard_attend(choose_attention(attention, platform), mesh)
    if dtype is None:
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    loaded = load_folder(folder, mesh=mesh, preset=preset, dtype=dtype, param_dtype=dtype)
    if quantize is not None:
        quantize_decoder(loaded.model, quantize)
    tokenizer = add_tokens(loaded.tokenizer, tokens, loaded.config)
    engine = Engine(loaded.model, loaded.vae, tokenizer.special, len(tokenizer), Backend(attend, make_constrain(mesh)))
    return Generator(loaded.config, engine, make_encoder(loaded.config, tokenizer))


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], config: LoomConfig) -> Tokenizer:
    """Returns a tokenizer that has `tokens`: those that it lacks get the ids after its last one.

    Raises:
      TokenizerError: the embedding table has no rows for them.
    """
    extended, rows = tokenizer.with_tokens(tokens), config.decoder.vocab_size
    beyond = [token for token in tokens if extended.token_id(token) >= rows]
    if beyond:
        raise TokenizerError(
            f"the embedding table has {rows} rows, none for {len(beyond)} of {len(tokens)} added tokens, {beyond[0]!r} "
            f"first (id {extended.token_id(beyond[0])}): add fewer tokens, or take a checkpoint with more rows"
        )
    return extended
