"""A tiny random model whose sizes differ from each other and from the recorded set, and documents for it.

Every function is cached, and compiled calls are shared: a test file that uses them compiles little.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image as PILImage

from loom_jax.converters.bagel import to_orbax
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import AutoencoderConfig, DecoderConfig, LoomConfig, SiglipConfig
from loom_jax.data import Batch, Budget, Packable, Tables, pack
from loom_jax.data.world import build_tokenizer
from loom_jax.document import EncodedSegment, Encoder, ImageTokens, ImageTransform, TextTokens, Tokenizer, lay_out
from loom_jax.generate import Engine, Generator, NoiseSource
from loom_jax.models import Autoencoder, Decoded, LoomModel
from loom_jax.nn import sincos_2d_table
from tests.reference import CKPT

CONFIG = LoomConfig(
    decoder=DecoderConfig(
        vocab_size=520,
        hidden_size=60,
        intermediate_size=92,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=14,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
    ),
    vit=SiglipConfig(hidden_size=40, intermediate_size=68, num_layers=3, num_heads=5, patch_size=6, num_positions=36),
    vae=AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=5, scale_factor=0.4, shift_factor=0.1),
    max_latent_size=7,
    vit_max_num_patch_per_side=6,
    latent_patch_size=3,
)
"""Six query heads on two key heads, a ViT grid of 6, a latent table of 7, tokens of 3 x 3 latents of 5 channels."""
WORLD = dataclasses.replace(
    CONFIG,
    vit=dataclasses.replace(CONFIG.vit, patch_size=16, num_positions=16),
    vae=dataclasses.replace(CONFIG.vae, ch_mult=(1, 1, 2)),
    latent_patch_size=4,
    vit_max_num_patch_per_side=4,
    max_latent_size=4,
)
"""Tokens of 16 x 16 pixels, so that pictures of the world have 4 x 4 of them."""


def write_world(folder: Path) -> Path:
    """Writes a converted folder of WORLD with random weights and the world's tokenizer into `folder`; returns it."""
    (folder / "tokenizer").mkdir()
    build_tokenizer().save(folder / "tokenizer")
    write_synthetic_release(folder / "release", WORLD, seed=3, tokenizer=folder / "tokenizer")
    to_orbax(folder / "release", folder / "converted")
    return folder / "converted"


def fill(module: nnx.Module, seed: int = 0) -> Any:
    """Returns an abstract module with random weights, drawn by name: all of them matter, activations stay near one."""
    graphdef, state = nnx.split(module)
    paths = jax.tree_util.tree_leaves_with_path(state)
    leaves = [
        _weights(jax.tree_util.keystr(path), leaf.shape, np.random.default_rng([seed, n]))
        for n, (path, leaf) in enumerate(paths)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    if "table" in name:
        return jnp.asarray(sincos_2d_table(shape[1], math.isqrt(shape[0])))
    drawn = rng.standard_normal(shape, np.float32)
    if "scale" in name:
        return jnp.asarray(1 + 0.2 * drawn)
    if "embedding" in name and "patch" not in name:
        return jnp.asarray(drawn)
    if "bias" in name:
        return jnp.asarray(0.1 * drawn)
    inputs = math.prod(shape[:-1]) / (shape[0] if "layers" in name else 1)
    return jnp.asarray(drawn / np.sqrt(inputs))


def build(config: LoomConfig = CONFIG, seed: int = 0) -> LoomModel:
    """Returns the transformer with random weights; what two configurations share in shapes they share in weights."""
    return fill(nnx.eval_shape(lambda: LoomModel(config, rngs=nnx.Rngs(0))), seed)


@functools.cache
def model() -> LoomModel:
    return build()


@functools.cache
def vae() -> Autoencoder:
    return fill(nnx.eval_shape(lambda: Autoencoder(CONFIG.vae, rngs=nnx.Rngs(0))), 1)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(CKPT)


@functools.cache
def encoder() -> Encoder:
    """Pictures become 3 to 7 latent tokens a side, and 2 to 6 ViT patches a side."""
    return Encoder(
        tokenizer(),
        CONFIG.latent_stride,
        CONFIG.vit.patch_size,
        ImageTransform(max_size=42, min_size=18, stride=6),
        ImageTransform(max_size=36, min_size=12, stride=6),
    )


@functools.cache
def engine() -> Engine:
    """The compiled calls, shared by all tests that do not count compilations from zero."""
    return Engine(model(), vae(), encoder().special, len(tokenizer()))


def generator(noise: NoiseSource | None = None) -> Generator:
    return Generator(CONFIG, engine(), encoder(), noise)


def picture(height: int, width: int, seed: int = 0) -> PILImage.Image:
    """Returns a random RGB picture of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
    return PILImage.fromarray(small).resize((width, height), PILImage.Resampling.BICUBIC)


def text(length: int, seed: int = 0, **options: Any) -> TextTokens:
    """Returns a text of random ids."""
    return TextTokens(np.random.default_rng([seed, length]).integers(0, 460, length).tolist(), **options)


def image(role: Any, rows: int, columns: int, seed: int = 0, **options: Any) -> ImageTokens:
    """Returns an image of random pixels with a grid of tokens."""
    cell = CONFIG.vit.patch_size if role == "vit" else CONFIG.latent_stride
    pixels = np.random.default_rng([seed, rows, columns]).uniform(-1, 1, (rows * cell, columns * cell, 3))
    return ImageTokens(role, (rows, columns), pixels.astype(np.float32), **options)


def packable(segments: Sequence[EncodedSegment], **options: Any) -> Packable:
    return Packable(segments, lay_out(segments, encoder().special, **options))


@functools.cache
def tables() -> Tables:
    return Tables.of(CONFIG)


BUDGET = Budget(und=72, gen=44, vit=26)
"""Of one row of training: fits any two of the DOCUMENTS, with filler to spare."""

DOCUMENTS: tuple[tuple[EncodedSegment, ...], ...] = (
    (text(5, loss=True), image("vit", 2, 3), image("clean", 3, 2), text(4, 1, loss=True), image("noisy", 2, 4)),
    (
        text(3),
        image("noisy", 2, 3),
        image("clean", 2, 3),
        image("vit", 3, 2),
        text(6, 2, loss=True),
        image("noisy", 3, 3),
    ),
)
"""All roles in one document; and an image that is made, then read, before the next one is made."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch with everything that is random about it: clean latents, noise [B, G, C] and timesteps [B, G]."""

    batch: Batch
    clean: np.ndarray
    noise: np.ndarray
    timesteps: np.ndarray

    @property
    def state(self) -> np.ndarray:
        t = self.timesteps[..., None]
        return (1 - t) * self.clean + t * self.noise


def draw(rows: Sequence[Sequence[Sequence[EncodedSegment]]], budget: Budget = BUDGET) -> Drawn:
    """Packs rows of documents. What is drawn belongs to the document, not to the place where it lies."""
    batch = pack([[packable(d) for d in row] for row in rows], budget, tables())
    shape = (*batch.streams.gen.document.shape, CONFIG.latent_dim)
    clean, noise, t = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    for row, documents in enumerate(rows):
        for number, document in enumerate(documents):
            own = batch.streams.gen.document[row] == number
            rng = np.random.default_rng(len(document) + 100 * document[0].ids[0])
            clean[row, own] = rng.standard_normal((own.sum(), shape[2]))
            noise[row, own] = rng.standard_normal((own.sum(), shape[2]))
            for split in np.unique(batch.streams.gen.split[row, own]):
                here = own & (batch.streams.gen.split[row] == split)
                u = rng.uniform(0.2, 0.9)
                t[row, here] = np.where(batch.targets.noise_split[row, here] >= 0, u, 0.0)
    return Drawn(batch, clean, noise, t)


@functools.cache
def _forward() -> Any:
    graphdef, params = nnx.split(model())
    call = jax.jit(lambda p, *args: nnx.merge(graphdef, p)(*args))
    return lambda *args: call(params, *args)


def forward(drawn: Drawn) -> Decoded:
    """Runs the training forward of the tiny model, compiled once for each shape."""
    return _forward()(drawn.batch.streams, drawn.state, drawn.timesteps)


def relative(actual: Any, expected: Any) -> float:
    """Returns max|actual - expected| / rms(expected)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2)))
