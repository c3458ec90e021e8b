"""Clean latents of a training batch: encoded on the fly by the frozen autoencoder, or sampled from stored moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from loom_jax.data import Canvas, TrainBatch
from loom_jax.models import Autoencoder


def clean_latents(vae: Autoencoder, batch: TrainBatch, patch: int, key: jax.Array) -> jax.Array:
    """Returns the clean latent of every gen token, float32 [B, G, C], zero for filler. Posteriors are sampled.

    An image is encoded as if it stood alone, whatever canvas it lies on.
    """
    if batch.moments is not None:
        return sample_moments(vae, batch.moments, key)
    pools = [
        encode_canvas(vae, canvas, patch, jax.random.fold_in(key, number))
        for number, canvas in enumerate(batch.canvases)
    ]
    index = batch.latent_index
    if not pools:
        return jnp.zeros((*index.shape, patch**2 * vae.config.z_channels), jnp.float32)
    pool = jax.lax.stop_gradient(jnp.concatenate(pools, axis=1))
    taken = jnp.take_along_axis(pool, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where((index >= 0)[..., None], taken, 0.0)


def encode_canvas(vae: Autoencoder, canvas: Canvas, patch: int, key: jax.Array) -> jax.Array:
    """Returns the latent tokens of canvases [B, N, H, W, 3], row-major over each whole canvas: [B, N h w, C].

    The places of a row are encoded one after the other: all at once would take some GiB each at full size.
    """
    rows, places, height, width = canvas.pixels.shape[:4]
    down = vae.config.downsample
    shape = (places, rows, height // down, width // down, vae.config.z_channels)
    noise = jax.random.normal(key, shape, jnp.float32)

    def encode(place: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        pixels, sizes, noise = place
        return vae.sample(vae.encode(to_unit(pixels), sizes), noise, sizes)

    latents = jax.lax.map(encode, (jnp.swapaxes(canvas.pixels, 0, 1), jnp.swapaxes(canvas.sizes, 0, 1), noise))
    return rearrange(latents, "n b (h p) (w q) c -> b (n h w) (p q c)", p=patch, q=patch)


def to_unit(pixels: jax.Array) -> jax.Array:
    """Returns uint8 pixels as float32 in [-1, 1], as `document.normalize` does; floats stay as they are."""
    if pixels.dtype != jnp.uint8:
        return pixels
    return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


def sample_moments(vae: Autoencoder, moments: jax.Array, key: jax.Array) -> jax.Array:
    """Samples stored moments [B, G, 2C]: means of a token, then its log variances, as `loom data encode` wrote them."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return vae.config.scale_factor * (mean + jnp.exp(logvar / 2) * noise - vae.config.shift_factor)
