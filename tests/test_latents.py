"""Clean latents of a batch: each image as if encoded alone, and each of its tokens with a sample of its own."""

import functools

import jax
import numpy as np
from flax import nnx

from loom_jax.document import NO_TOKEN, pack_latent
from loom_jax.models import Autoencoder
from loom_jax.train import clean_latents
from loom_jax.train.latents import to_unit
from tests import training

PATCH = training.RECIPE["model"]["latent_patch_size"]


@functools.cache
def batch():
    return training.train_batch(training.config("data.mixture.1.weight=8.0"))


def latents(given):
    graphdef, params = nnx.split(Autoencoder(training.config().model.vae, rngs=nnx.Rngs(0)), nnx.Param)

    def call(params, given, key):
        vae = nnx.merge(graphdef, params)
        return clean_latents(vae, given, PATCH, key)

    return np.asarray(jax.jit(call)(params, given, jax.random.key(3)))


@functools.cache
def moments():
    """Means, then log variances of every gen token [B, G, 2C], each picture cut out of its canvas and encoded alone."""
    vae = Autoencoder(training.config().model.vae, rngs=nnx.Rngs(0))
    given = batch()
    (canvas,) = given.canvases
    index, cell = given.latent_index, given.batch.latents.cell
    cells = canvas.pixels[0, 0, :, :, 0].size // (PATCH * vae.config.downsample) ** 2
    out = np.zeros((*index.shape, 2 * PATCH**2 * vae.config.z_channels), np.float32)
    for b, n in np.argwhere(canvas.sizes[..., 0] > 0):
        height, width = canvas.sizes[b, n]
        alone = vae.encode(to_unit(canvas.pixels[b, n, :height, :width][None]))
        tokens = np.concatenate([pack_latent(np.asarray(part)[0], PATCH) for part in alone], axis=-1)
        own = (index[b] != NO_TOKEN) & (index[b] // cells == n)
        out[b, own] = tokens[cell[b, own]]
    return out


def test_an_image_on_a_canvas_is_encoded_as_if_alone():
    stored = batch()._replace(canvases=(), moments=moments())
    found, expected = latents(batch()), latents(stored)
    used = batch().latent_index != NO_TOKEN
    assert used.sum() > 100 and not found[~used].any() and not expected[~used].any()
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.sqrt(np.mean(expected[used] ** 2)))


def test_copies_of_one_picture_have_samples_of_their_own():
    """Source: the original encodes every image of a sample, and draws on every encode (spec section 6)."""
    found, index, shown = latents(batch()), batch().latent_index, batch().batch.latents.image
    config = training.config().model.vae
    mean, logvar = np.split(moments(), 2, axis=-1)
    noise = (found / config.scale_factor + config.shift_factor - mean) / np.exp(logvar / 2)
    pairs = [
        (noise[b, first], noise[b, second])
        for b in range(len(index))
        for first in range(index.shape[1])
        for second in range(first + 1, index.shape[1])
        if index[b, first] == index[b, second] != NO_TOKEN and shown[b, first] != shown[b, second]
    ]
    assert len(pairs) > 10
    one, other = (np.stack(side).ravel() for side in zip(*pairs, strict=True))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.2
    drawn = noise[index != NO_TOKEN]
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1
