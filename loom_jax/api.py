"""What a Python user imports: `load`, then `generate`; `convert` to get there.

from loom_jax import api

api.convert("BAGEL-7B-MoT", "bagel_7b")
generator = api.load("bagel_7b")
[result] = generator.generate([api.Request(("A small boat on a quiet lake",))])
result.image.save("boat.png")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from loom_jax.checkpoint import load_module, read_folder
from loom_jax.converters.bagel import from_orbax as export
from loom_jax.converters.bagel import to_orbax as convert
from loom_jax.core import ConfigError, LoomConfig
from loom_jax.document import Tokenizer, make_encoder
from loom_jax.generate import Engine, Generator, ImageSettings, Request, Result, TextSettings
from loom_jax.models import Autoencoder, LoomModel
from loom_jax.nn import ATTENTION_BACKENDS

__all__ = ["ImageSettings", "Request", "Result", "TextSettings", "convert", "export", "load"]


def load(
    folder: str | Path,
    *,
    preset: str = "single",
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    attention: str = "auto",
) -> Generator:
    """Loads a converted folder, ready to generate.

    Args:
      folder: made by `convert` (or `loom convert`).
      preset: how the weights lie on the devices, see loom_jax.parallel; `single` is one device.
      mesh: the devices; by default `make_mesh(preset)`.
      dtype: of weights and computation; by default bfloat16 on accelerators and float32 on CPU.
      attention: a key of loom_jax.nn.ATTENTION_BACKENDS.

    Raises:
      CheckpointError: the folder is not a converted model, or is broken.
      ConfigError: `attention` or `preset` is not known.
    """
    if attention not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention={attention!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    converted = read_folder(folder)
    place: dict[str, Any] = {"mesh": mesh, "preset": preset}

    def build(config: LoomConfig) -> LoomModel:
        return LoomModel(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    model = load_module(converted, "model", build, dtype=dtype, **place)
    # The autoencoder stays in float32: it is small, and the release ships it so.
    vae = load_module(converted, "vae", lambda c: Autoencoder(c.vae, rngs=nnx.Rngs(0)), dtype=jnp.float32, **place)
    tokenizer = Tokenizer.from_folder(converted.path)
    engine = Engine(model, vae, tokenizer.special, len(tokenizer), ATTENTION_BACKENDS[attention])
    return Generator(converted.config, engine, make_encoder(converted.config, tokenizer))
