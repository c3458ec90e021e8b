"""Clean latents of a training batch: encoded on the fly by the frozen autoencoder, or sampled from stored moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from loom_jax.data import Canvas, TrainBatch
from loom_jax.document import NO_TOKEN
from loom_jax.models import Autoencoder


def clean_latents(vae: Autoencoder, batch: TrainBatch, patch: int, key: jax.Array) -> jax.Array:
    """Returns the clean latent of every gen token, float32 [B, G, C], zero for filler.

    An image is encoded as if it stood alone, whatever canvas it lies on. Every token draws from its posterior: the
    noisy and the clean copy of a picture share a canvas, but no sample. Source: spec section 6.
    """
    used = (batch.batch.latents.image != NO_TOKEN)[..., None]
    if batch.moments is not None:
        moments = batch.moments
    elif batch.canvases:
        pool = jnp.concatenate([encode_canvas(vae, canvas, patch) for canvas in batch.canvases], axis=1)
        moments = jnp.take_along_axis(pool, jnp.maximum(batch.latent_index, 0)[..., None], axis=1)
    else:
        return jnp.zeros((*batch.latent_index.shape, patch**2 * vae.config.z_channels), jnp.float32)
    return jnp.where(used, sample_moments(vae, jax.lax.stop_gradient(moments), key), 0.0)


def encode_canvas(vae: Autoencoder, canvas: Canvas, patch: int) -> jax.Array:
    """Returns the moments of latent tokens of canvases [B, N, H, W, 3], row-major over each canvas: [B, N h w, 2C].

    The places of a row are encoded one after the other: all at once would take some GiB each at full size.
    """

    def encode(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        pixels, sizes = place
        return jnp.stack(vae.encode(to_unit(pixels), sizes), axis=-2)

    moments = jax.lax.map(encode, (jnp.swapaxes(canvas.pixels, 0, 1), jnp.swapaxes(canvas.sizes, 0, 1)))
    return rearrange(moments, "n b (h p) (w q) k c -> b (n h w) (k p q c)", p=patch, q=patch)


def to_unit(pixels: jax.Array) -> jax.Array:
    """Returns uint8 pixels as float32 in [-1, 1], as `document.normalize` does; floats stay as they are."""
    if pixels.dtype != jnp.uint8:
        return pixels
    return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


def sample_moments(vae: Autoencoder, moments: jax.Array, key: jax.Array) -> jax.Array:
    """Samples moments [B, G, 2C]: means of a token, then its log variances, as `encode_canvas` gives them."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return vae.config.scale_factor * (mean + jnp.exp(logvar / 2) * noise - vae.config.shift_factor)
