"""The whole transformer: embeddings of both streams, ViT, decoder and the two heads (spec sections 1, 3 and 4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.core import LoomConfig
from loom_jax.data import Streams
from loom_jax.document import NO_TOKEN
from loom_jax.models.capture import Capture
from loom_jax.models.mot import Constrain, Decoded, Decoder, Past, detach, unconstrained
from loom_jax.models.siglip import Siglip
from loom_jax.nn import Attend, PositionTable, TimestepEmbedder, dense_attention, linear_dot


class Connector(nnx.Module):
    """ViT features [B, V, Dv] -> decoder width [B, V, D]: Linear, gelu (tanh), Linear."""

    def __init__(self, vit_width: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs, "dot_general": linear_dot}
        self.fc1 = nnx.Linear(vit_width, width, **options)
        self.fc2 = nnx.Linear(width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


class LoomModel(nnx.Module):
    """Text, ViT and latent tokens in; hidden states, logits and velocities out. The autoencoder stands apart.

    Args:
      config: sizes.
      rngs: of the initialisation.
      dtype: of the computation; norms, softmax, rope and timesteps are float32 whatever it is.
      param_dtype: of the weights.
    """

    def __init__(
        self,
        config: LoomConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.decoder.hidden_size
        self.config, self.dtype = config, dtype
        self.embed_tokens = nnx.Embed(config.decoder.vocab_size, width, **options)
        self.vit = Siglip(config.vit, **options)
        self.connector = Connector(config.vit.hidden_size, width, **options)
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width, param_dtype=param_dtype)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width, param_dtype=param_dtype)
        linear = {**options, "dot_general": linear_dot}
        self.time_embedder = TimestepEmbedder(width, **options)
        self.vae2llm = nnx.Linear(config.latent_dim, width, **linear)
        self.decoder = Decoder(config.decoder, **options)
        self.lm_head = nnx.Linear(width, config.decoder.vocab_size, use_bias=False, **linear)
        self.llm2vae = nnx.Linear(width, config.latent_dim, **linear)

    def vit_tokens(self, streams: Streams, attend: Attend = dense_attention, remat: str = "none") -> jax.Array:
        """Returns the ViT tokens of each row's pool, [B, V, D]."""
        features = self.vit(streams.patches, streams.vit_positions, streams.vit_segments, attend, remat)
        return self.connector(features) + self.vit_pos_embed(streams.vit_positions).astype(self.dtype)

    def embed_und(self, streams: Streams, attend: Attend = dense_attention, remat: str = "none") -> jax.Array:
        """Returns the und stream [B, U, D]: embedding rows, and ViT tokens where the layout has them."""
        text = self.embed_tokens.embedding[...][streams.token_ids].astype(self.dtype)
        if streams.patches.shape[1] == 0:
            return text
        is_vit = (streams.vit_index != NO_TOKEN)[..., None]
        index = jnp.maximum(streams.vit_index, 0)[..., None]
        vit_tokens = self.vit_tokens(streams, attend, remat)
        return jnp.where(is_vit, jnp.take_along_axis(vit_tokens, index, axis=1), text)

    def embed_gen(self, latents: jax.Array, timesteps: jax.Array, latent_positions: jax.Array) -> jax.Array:
        """Returns the gen stream [B, G, D] of latents [B, G, C] at timesteps [B, G] or [B, 1] (0 for clean images)."""
        position = self.latent_pos_embed(latent_positions).astype(self.dtype)
        return self.vae2llm(latents) + self.time_embedder(timesteps) + position

    def __call__(
        self,
        streams: Streams,
        latents: jax.Array,
        timesteps: jax.Array,
        past: Past | None = None,
        *,
        attend: Attend = dense_attention,
        constrain: Constrain = unconstrained,
        remat: str = "none",
        freeze_und: bool = False,
        return_kv: bool = False,
        return_layers: bool = False,
        capture: Capture | None = None,
    ) -> Decoded:
        """Runs the transformer on packed streams, after `past` if given.

        Args:
          streams: layouts, token ids and patches.
          latents: float32 [B, G, C], the flow state of every gen token.
          timesteps: float32 [B, G] or [B, 1] in [0, 1].
          freeze_und: cuts the gradients of all und activations.
          remat: what the layers of the ViT and the decoder keep for the backward pass, a key of REMAT_POLICIES.
          return_kv, return_layers, capture: what else is returned, see Decoded.
        """
        und = detach(self.embed_und(streams, attend, remat), freeze_und)
        und = constrain(und, ("batch", "length", "embed"))
        gen = constrain(self.embed_gen(latents, timesteps, streams.latent_positions), ("batch", "length", "embed"))
        return self.decoder(
            und,
            gen,
            streams.und,
            streams.gen,
            past,
            attend=attend,
            constrain=constrain,
            remat=remat,
            freeze_und=freeze_und,
            return_kv=return_kv,
            return_layers=return_layers,
            capture=capture,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """und hidden states [..., D] -> float32 logits [..., vocab]."""
        return self.lm_head(hidden).astype(jnp.float32)

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """gen hidden states [..., D] -> float32 velocity [..., C]."""
        return self.llm2vae(hidden).astype(jnp.float32)
