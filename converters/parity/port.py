"""This framework's side of a comparison: the converted checkpoint, loaded in float32."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.converters.bagel import to_orbax
from loom_jax.converters.parity.records import Records
from loom_jax.core import LoomConfig
from loom_jax.data import Packable, Tables
from loom_jax.document import EncodedSegment, Encoder, ImageTransform, lay_out
from loom_jax.models import Autoencoder, LoomModel, load_folder


@dataclasses.dataclass(frozen=True)
class Port:
    """The networks with the weights of the set, and the document encoder with its transforms."""

    config: LoomConfig
    model: LoomModel
    vae: Autoencoder
    encoder: Encoder

    @property
    def tables(self) -> Tables:
        """Sizes that packing needs."""
        return Tables.of(self.config)

    def packable(self, segments: Sequence[EncodedSegment], weighting: Any = "square") -> Packable:
        """Returns one document with its layout."""
        return Packable(segments, lay_out(segments, self.encoder.special, weighting=weighting))

    def expert_layer(self, index: int) -> Any:
        """Returns decoder layer `index` as a module of its own."""
        graphdef, params = nnx.split(self.model.decoder.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], params))

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """All parameters of the transformer by path, layers stacked."""
        return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self.model))}


def open_port(records: Records) -> Port:
    """Converts the set's checkpoint into a temporary folder and loads it from there in float32."""
    with tempfile.TemporaryDirectory(prefix="loom_parity_") as scratch:
        to_orbax(records.folder / "ckpt", Path(scratch) / "converted")
        loaded = load_folder(Path(scratch) / "converted", param_dtype=jnp.float32)
    settings = records.settings
    encoder = Encoder(
        tokenizer=loaded.tokenizer,
        latent_stride=loaded.config.latent_stride,
        vit_patch=loaded.config.vit.patch_size,
        vae_transform=ImageTransform(*settings["vae_tf"]),
        vit_transform=ImageTransform(*settings["vit_tf"]),
    )
    return Port(loaded.config, loaded.model, loaded.vae, encoder)


def channels_first(x: Any) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W], the layout of the records."""
    return np.moveaxis(np.asarray(x), -1, -3)


def channels_last(x: np.ndarray) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(x, -3, -1)
