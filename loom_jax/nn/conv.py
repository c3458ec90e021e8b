"""Convolution and group normalisation of images [N, h, w, C] that may lie on a larger canvas.

`valid` [N, h, w, 1] bool marks the cells of the image; None means that the image fills its canvas. What lies outside
has no influence on what lies inside: a convolution sees zeros there, as if the image stood alone, and a norm does not
count it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loom_jax.core import ConfigError


def clear_outside(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns x [N, h, w, C] with zeros outside the image, even where x is not finite."""
    return x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))


class Conv(nnx.Module):
    """A 2-D convolution with bias, [N, h, w, in] -> [N, h', w', out]; odd kernels keep the size at stride 1."""

    stride = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.dtype = dtype

    def padding(self) -> tuple[int, int]:
        """Zeros (before, after) along both sides of the image."""
        half = self.kernel[...].shape[0] // 2
        return half, half

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        out = jax.lax.conv_general_dilated(
            clear_outside(x, valid).astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=(self.padding(), self.padding()),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + self.bias[...].astype(self.dtype)


class Downsample(Conv):
    """Halves the sides, rounding down: 3x3 at stride 2, padded by one row and column at the bottom and right only."""

    stride = 2

    def padding(self) -> tuple[int, int]:
        return 0, 1


class Upsample(Conv):
    """Doubles the sides: each cell repeated 2x2, then a 3x3 convolution. `valid` belongs to the input."""

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return super().__call__(repeat_2x2(clear_outside(x, valid)), None)


def repeat_2x2(x: jax.Array) -> jax.Array:
    """[N, h, w, C] -> [N, 2h, 2w, C], each cell repeated: nearest neighbour."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class GroupNorm(nnx.Module):
    """Normalises each image over its cells and the channels of a group, in float32; returns the dtype of its input."""

    def __init__(
        self,
        features: int,
        *,
        num_groups: int = 32,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if features % num_groups:
            raise ConfigError(f"a layer of {features} channels cannot be split in {num_groups} groups for GroupNorm")
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.num_groups = num_groups
        self.eps = eps

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.num_groups, x.shape[3] // self.num_groups)
        inside = None if valid is None else valid[..., None]
        centred = grouped - _mean(grouped, inside)
        y = (centred * jax.lax.rsqrt(_mean(centred**2, inside) + self.eps)).reshape(x.shape)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def _mean(x: jax.Array, inside: jax.Array | None) -> jax.Array:
    """Mean of x [N, h, w, groups, c] over cells and channels of a group, kept as 1; 0 for an image without cells."""
    if inside is None:
        return x.mean(axis=(1, 2, 4), keepdims=True)
    cells = jnp.maximum(inside.sum(axis=(1, 2, 4), keepdims=True), 1)
    return jnp.where(inside, x, 0.0).sum(axis=(1, 2, 4), keepdims=True) / (cells * x.shape[-1])
