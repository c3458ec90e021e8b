"""The FLUX autoencoder, pixels <-> latents, for images of several sizes on one canvas (spec section 6, DESIGN 5.12).

Images are [N, h, w, channels]. Where `sizes` is given, image n is the top left `sizes[n]` of its canvas and comes out
as if it stood alone; without it every image fills the canvas.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.core import AutoencoderConfig, ImageError
from loom_jax.document import FULL, PADDING, TokenLayout
from loom_jax.nn.attention import blockwise_attention
from loom_jax.nn.conv import Conv, Downsample, GroupNorm, Upsample, clear_outside, repeat_2x2

MAX_DIRECT_CELLS = 4096
"""Above this many cells the mid attention runs over blocks, so that it never holds all pairs."""

ATTENTION_BLOCK = 2048
"""Cells in a block of the mid attention: few enough steps for a canvas of 1024 x 1024, 16 MiB of logits each."""

Stages = Iterator[tuple[str, jax.Array]]


class Moments(NamedTuple):
    """The posterior of an encoded image: mean and log variance, both float32 [N, h, w, C], zero outside the image."""

    mean: jax.Array
    logvar: jax.Array


class ResBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(
        self, in_features: int, out_features: int, *, groups: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = GroupNorm(in_features, num_groups=groups, rngs=rngs, param_dtype=param_dtype)
        self.conv1 = Conv(in_features, out_features, **options)
        self.norm2 = GroupNorm(out_features, num_groups=groups, rngs=rngs, param_dtype=param_dtype)
        self.conv2 = Conv(out_features, out_features, **options)
        self.nin_shortcut = Conv(in_features, out_features, 1, **options) if in_features != out_features else None

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x, valid)), valid)
        h = self.conv2(nnx.silu(self.norm2(h, valid)), valid)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nnx.Module):
    """x + attention of one head over all cells of the image."""

    def __init__(self, features: int, *, groups: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        linear = functools.partial(nnx.Linear, features, features, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = GroupNorm(features, num_groups=groups, rngs=rngs, param_dtype=param_dtype)
        self.q, self.k, self.v, self.proj_out = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        n, h, w, c = x.shape
        y = self.norm(x, valid).reshape(n, h * w, 1, c)
        inside = None if valid is None else valid.reshape(n, h * w)
        out = attend_to_cells(self.q(y), self.k(y), self.v(y), inside)
        return x + self.proj_out(out).reshape(x.shape)


def attend_to_cells(
    q: jax.Array, k: jax.Array, v: jax.Array, inside: jax.Array | None, max_direct: int = MAX_DIRECT_CELLS
) -> jax.Array:
    """Attends from every cell to every cell of its image: q, k, v [N, cells, 1, C] -> [N, cells, 1, C].

    Args:
      q, k, v: queries, keys and values of one head. Logits and softmax are float32.
      inside: bool [N, cells], True for cells of the image; None for all.
      max_direct: with more cells than this the result is computed over blocks, in memory linear in the cells.
    """
    n, cells = q.shape[:2]
    if cells <= max_direct:
        return jax.nn.dot_product_attention(q, k, v, mask=None if inside is None else inside[:, None, None])
    zero = jnp.zeros((n, cells), jnp.int32)
    document = zero if inside is None else jnp.where(inside, 0, PADDING)
    layout = TokenLayout(document=document, split=zero, mode=zero + FULL, order=zero, position=zero)
    return blockwise_attention(q, k, v, layout, layout, block_size=ATTENTION_BLOCK)


class Mid(nnx.Module):
    """The part at the lowest resolution: block, attention, block."""

    def __init__(self, features: int, *, groups: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        options = {"groups": groups, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.block_1 = ResBlock(features, features, **options)
        self.attn_1 = AttentionBlock(features, **options)
        self.block_2 = ResBlock(features, features, **options)

    def stages(self, x: jax.Array, valid: jax.Array | None) -> Stages:
        """Yields (name, activation) of each part in order."""
        for name, part in (("block_1", self.block_1), ("attn_1", self.attn_1), ("block_2", self.block_2)):
            x = part(x, valid)
            yield f"mid.{name}", x


class DownLevel(nnx.Module):
    """Residual blocks of one resolution of the encoder, then the step to the next one."""

    def __init__(
        self, widths: list[int], downsamples: bool, *, groups: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.block = nnx.List([ResBlock(a, b, groups=groups, **options) for a, b in itertools.pairwise(widths)])
        self.downsample = Downsample(widths[-1], widths[-1], **options) if downsamples else None


class UpLevel(nnx.Module):
    """Residual blocks of one resolution of the decoder, then the step to the next higher one."""

    def __init__(
        self, widths: list[int], upsamples: bool, *, groups: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.block = nnx.List([ResBlock(a, b, groups=groups, **options) for a, b in itertools.pairwise(widths)])
        self.upsample = Upsample(widths[-1], widths[-1], **options) if upsamples else None


class Encoder(nnx.Module):
    """Pixels [N, H, W, 3] -> mean and log variance [N, H/downsample, W/downsample, 2C]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        widths = [config.ch * mult for mult in config.ch_mult]
        groups, entry = config.num_groups, [config.ch, *widths[:-1]]
        self.conv_in = Conv(config.in_channels, config.ch, **options)
        self.down = nnx.List(
            DownLevel([before] + [width] * config.num_res_blocks, level < len(widths) - 1, groups=groups, **options)
            for level, (before, width) in enumerate(zip(entry, widths, strict=True))
        )
        self.mid = Mid(widths[-1], groups=groups, **options)
        self.norm_out = GroupNorm(widths[-1], num_groups=groups, rngs=rngs, param_dtype=param_dtype)
        self.conv_out = Conv(widths[-1], 2 * config.z_channels, **options)

    def stages(self, x: jax.Array, valid: jax.Array | None = None) -> Stages:
        """Yields (name, activation) of every part in order, by the names of the checkpoint, ending with `conv_out`."""
        x = self.conv_in(x, valid)
        yield "conv_in", x
        for index, level in enumerate(self.down):
            for b, block in enumerate(level.block):
                x = block(x, valid)
                yield f"down.{index}.block.{b}", x
            if level.downsample is not None:
                x = level.downsample(x, valid)
                valid = None if valid is None else valid[:, 1::2, 1::2]
                yield f"down.{index}.downsample", x
        for name, h in self.mid.stages(x, valid):
            x = h
            yield name, x
        x = self.conv_out(nnx.silu(self.norm_out(x, valid)), valid)
        yield "conv_out", clear_outside(x, valid)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return _last(self.stages(x, valid))


class Decoder(nnx.Module):
    """Latents [N, h, w, C], unscaled -> pixels [N, h*downsample, w*downsample, 3]; `up[0]` is the largest."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        widths = [config.ch * mult for mult in config.ch_mult]
        groups, entry = config.num_groups, [*widths[1:], widths[-1]]
        self.conv_in = Conv(config.z_channels, widths[-1], **options)
        self.mid = Mid(widths[-1], groups=groups, **options)
        self.up = nnx.List(
            UpLevel([before] + [width] * (config.num_res_blocks + 1), level > 0, groups=groups, **options)
            for level, (before, width) in enumerate(zip(entry, widths, strict=True))
        )
        self.norm_out = GroupNorm(widths[0], num_groups=groups, rngs=rngs, param_dtype=param_dtype)
        self.conv_out = Conv(widths[0], config.out_ch, **options)

    def stages(self, z: jax.Array, valid: jax.Array | None = None) -> Stages:
        """Yields (name, activation) of every part in order, by the names of the checkpoint, ending with `conv_out`."""
        x = self.conv_in(z, valid)
        yield "conv_in", x
        for name, h in self.mid.stages(x, valid):
            x = h
            yield name, x
        for index in reversed(range(len(self.up))):
            level = self.up[index]
            for b, block in enumerate(level.block):
                x = block(x, valid)
                yield f"up.{index}.block.{b}", x
            if level.upsample is not None:
                x = level.upsample(x, valid)
                valid = None if valid is None else repeat_2x2(valid)
                yield f"up.{index}.upsample", x
        x = self.conv_out(nnx.silu(self.norm_out(x, valid)), valid)
        yield "conv_out", clear_outside(x, valid)

    def __call__(self, z: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return _last(self.stages(z, valid))


def _last(stages: Stages) -> jax.Array:
    """Returns the activation of the last stage, keeping none of the others."""
    return deque(stages, maxlen=1)[0][1]


class Autoencoder(nnx.Module):
    """The FLUX autoencoder. Latents are `scale_factor * (posterior sample - shift_factor)`, float32.

    Args of its methods:
      sizes: int32 [N, 2], height and width in pixels of each image on its canvas, multiples of `config.downsample`; an
        image of size (0, 0) is an unused place. None where all images fill the canvas. Results are zero outside.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def encode(self, pixels: jax.Array, sizes: jax.Array | None = None) -> Moments:
        """Returns the posterior of pixels [N, H, W, 3] in [-1, 1].

        Raises:
          ImageError: the shape is not [N, H, W, 3], or a side of the canvas is not a multiple of `config.downsample`.
        """
        _check_shape("pixels", pixels, self.config.in_channels, self.config.downsample)
        moments = self.encoder(pixels, valid_cells(sizes, pixels.shape)).astype(jnp.float32)
        return Moments(*jnp.split(moments, 2, axis=-1))

    def sample(self, moments: Moments, noise: jax.Array | None, sizes: jax.Array | None = None) -> jax.Array:
        """Returns the latents [N, h, w, C] that standard normal `noise` [N, h, w, C] picks; the mean if it is None.

        z = scale (mean + exp(logvar / 2) noise - shift). Source: spec section 6.
        """
        z = moments.mean if noise is None else moments.mean + jnp.exp(moments.logvar / 2) * noise
        z = self.config.scale_factor * (z - self.config.shift_factor)
        return clear_outside(z, valid_cells(sizes, z.shape, self.config.downsample))

    def decode(self, z: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """Returns pixels float32 [N, H, W, 3], about in [-1, 1], of latents z [N, h, w, C]. `sizes` are of the pixels.

        Raises:
          ImageError: the shape is not [N, h, w, C].
        """
        _check_shape("latents", z, self.config.z_channels, 1)
        z = z / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z, valid_cells(sizes, z.shape, self.config.downsample)).astype(jnp.float32)


def valid_cells(sizes: jax.Array | None, shape: tuple[int, ...], stride: int = 1) -> jax.Array | None:
    """Returns bool [N, h, w, 1], True on the image: the top left `sizes // stride` cells of a canvas of `shape`."""
    if sizes is None:
        return None
    extent = jnp.asarray(sizes) // stride
    rows = jnp.arange(shape[1]) < extent[:, :1]
    columns = jnp.arange(shape[2]) < extent[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Returns floor(clamp(x/2 + 1/2, 0, 1) * 255) as uint8: the original truncates, it does not round."""
    return (jnp.clip(pixels.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _check_shape(name: str, x: jax.Array, channels: int, multiple: int) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ImageError(f"{name} have shape {x.shape}, expected [N, height, width, {channels}]")
    if x.shape[1] % multiple or x.shape[2] % multiple:
        raise ImageError(
            f"{name} are {x.shape[1]} x {x.shape[2]}: both sides must be multiples of {multiple}, resize or pad them"
        )
