"""The SigLIP NaViT encoder: images of any grid packed in one row, attention inside each image (spec section 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.core import SiglipConfig
from loom_jax.document import FULL, PADDING, TokenLayout
from loom_jax.nn import Attend, LayerNorm, dense_attention, linear_dot, scan_layers, stack_layers


class SiglipActivations(NamedTuple):
    """What the encoder computes on the way: embeddings and features [B, V, Dv], layers [L, B, V, Dv] or None."""

    embeddings: jax.Array
    layers: jax.Array | None
    features: jax.Array


class SiglipLayer(nnx.Module):
    """x += attention(norm x), then x += mlp(norm x), both with biases; gelu in its tanh form."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        width, heads = config.hidden_size, (config.num_heads, config.hidden_size // config.num_heads)
        options: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear = {**options, "dot_general": linear_dot}
        norm: dict[str, Any] = {"epsilon": config.layer_norm_eps, **options}
        self.layer_norm1 = LayerNorm(width, **norm)
        self.q_proj = nnx.LinearGeneral(width, heads, **linear)
        self.k_proj = nnx.LinearGeneral(width, heads, **linear)
        self.v_proj = nnx.LinearGeneral(width, heads, **linear)
        self.out_proj = nnx.LinearGeneral(heads, width, axis=(-2, -1), **linear)
        self.layer_norm2 = LayerNorm(width, **norm)
        self.fc1 = nnx.Linear(width, config.intermediate_size, **linear)
        self.fc2 = nnx.Linear(config.intermediate_size, width, **linear)

    def __call__(self, x: jax.Array, layout: TokenLayout, attend: Attend) -> jax.Array:
        y = self.layer_norm1(x)
        x = x + self.out_proj(attend(self.q_proj(y), self.k_proj(y), self.v_proj(y), layout, layout))
        return x + self.fc2(nnx.gelu(self.fc1(self.layer_norm2(x)), approximate=True))


class Siglip(nnx.Module):
    """Packed patches in, features out.

    Args:
      config: sizes; `num_layers` counts the layers that exist.
      rngs: of the initialisation.
      dtype: of the computation; norms and softmax are float32 whatever it is.
      param_dtype: of the weights.
    """

    def __init__(
        self,
        config: SiglipConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        width = config.hidden_size
        self.patch_embedding = nnx.Linear(config.patch_dim, width, rngs=rngs, **options)
        self.position_embedding = nnx.Embed(config.num_positions, width, rngs=rngs, **options)
        self.layers = stack_layers(lambda keys: SiglipLayer(config, rngs=keys, **options), config.num_layers, rngs)
        self.post_layernorm = LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs, **options)

    def __call__(
        self,
        patches: jax.Array,
        position_ids: jax.Array,
        segments: jax.Array,
        attend: Attend = dense_attention,
        remat: str = "none",
    ) -> jax.Array:
        """Returns the features [B, V, Dv] of packed images, in the compute dtype; finite but meaningless at padding.

        Args:
          patches: [B, V, 3PP], normalised pixels, each patch in the order (row, column, channel).
          position_ids: int32 [B, V], row * side + column in the learned table; ignored at padding.
          segments: int32 [B, V], the number of the image within its row, PADDING (-1) for filler.
          attend: attention backend.
          remat: what a layer keeps for its backward pass, a key of `loom_jax.nn.REMAT_POLICIES`.
        """
        return self._run(patches, position_ids, segments, attend, remat, keep_layers=False).features

    def activations(
        self, patches: jax.Array, position_ids: jax.Array, segments: jax.Array, attend: Attend = dense_attention
    ) -> SiglipActivations:
        """Returns the features together with the embeddings and the output of every layer. Arguments as in the call."""
        return self._run(patches, position_ids, segments, attend, "none", keep_layers=True)

    def _run(
        self,
        patches: jax.Array,
        position_ids: jax.Array,
        segments: jax.Array,
        attend: Attend,
        remat: str,
        keep_layers: bool,
    ) -> SiglipActivations:
        ids = jnp.where(segments == PADDING, 0, position_ids)
        embeddings = self.patch_embedding(patches) + self.position_embedding(ids)
        zero = jnp.zeros_like(segments)
        layout = TokenLayout(document=segments, split=zero, mode=zero + FULL, order=zero, position=zero)

        def apply(layer: SiglipLayer, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
            x = layer(x, layout, attend)
            return x, x if keep_layers else None

        x, layers = scan_layers(self.layers, apply, embeddings, remat=remat)
        return SiglipActivations(embeddings, layers, self.post_layernorm(x))
