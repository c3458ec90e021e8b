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
        wide = x.astype(jnp.float32)
        centred = wide - _group_mean(wide, valid, self.num_groups)
        slope = jax.lax.rsqrt(_group_mean(centred**2, valid, self.num_groups) + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (centred * (slope * scale) + bias).astype(x.dtype)


def _group_mean(x: jax.Array, valid: jax.Array | None, groups: int) -> jax.Array:
    """Mean of x [N, h, w, C] over cells and the channels of a group, [N, 1, 1, C]; 0 for an image without cells.

    Cells are summed first: on a CPU one sum over cells and channels takes three times as long.
    """
    n, channels = len(x), x.shape[-1]
    if valid is None:
        mean = x.mean(axis=(1, 2))
    else:
        cells = jnp.maximum(valid.sum(axis=(1, 2)), 1)
        mean = jnp.where(valid, x, 0.0).sum(axis=(1, 2)) / cells
    of_groups = mean.reshape(n, groups, channels // groups).mean(-1)
    return jnp.repeat(of_groups, channels // groups, axis=-1).reshape(n, 1, 1, channels)
