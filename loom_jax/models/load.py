"""A converted folder as networks on their devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from loom_jax.checkpoint import load_module, read_folder
from loom_jax.core import LoomConfig
from loom_jax.document import Tokenizer
from loom_jax.models.autoencoder import Autoencoder
from loom_jax.models.loom import LoomModel


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What a converted folder holds, ready to be used."""

    path: Path
    config: LoomConfig
    model: LoomModel
    vae: Autoencoder
    tokenizer: Tokenizer


def load_folder(
    path: Path | str,
    *,
    mesh: Mesh | None = None,
    preset: str = "single",
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
) -> LoadedModel:
    """Loads a folder made by `loom convert`: weights go straight onto their devices.

    Args:
      mesh, preset: where the weights go; on the first device by default, on `parallel.make_mesh(preset)` where only a
        preset is given.
      dtype: of the transformer's computation; the autoencoder computes in float32.
      param_dtype: of the transformer's weights in memory; as stored by default.

    Raises:
      CheckpointError: the folder is no converted model, or its weights do not fit its configuration.
      TokenizerError: its tokenizer cannot be used.
    """
    folder = read_folder(path)
    where: dict[str, Any] = {"mesh": mesh, "preset": preset}
    tokenizer = Tokenizer.from_folder(folder.path)
    model = load_module(
        folder, "model", lambda config: LoomModel(config, rngs=nnx.Rngs(0), dtype=dtype), dtype=param_dtype, **where
    )
    # The autoencoder stays in float32: it is small, and the release ships it so.
    vae = load_module(
        folder, "vae", lambda config: Autoencoder(config.vae, rngs=nnx.Rngs(0)), dtype=jnp.float32, **where
    )
    return LoadedModel(folder.path, folder.config, model, vae, tokenizer)
