"""RMSNorm and LayerNorm of flax with a backward pass that suits CPUs too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

_Saved = tuple[jax.Array, jax.Array, jax.Array | None]


class RMSNorm(nnx.RMSNorm):
    """nnx.RMSNorm over the last axis: x / sqrt(mean(x^2) + epsilon) * scale, in float32; see `normalize`."""

    def __call__(self, x: jax.Array, mask: None = None) -> jax.Array:
        """x [..., D] -> [..., D] in the compute dtype; takes no mask."""
        assert mask is None
        x, scale = self.promote_dtype((x, self.scale[...]), dtype=self.dtype)
        return normalize(x, scale, None, self.epsilon)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis, the variance by squares of differences, in float32; see `normalize`."""

    def __call__(self, x: jax.Array, *, mask: None = None) -> jax.Array:
        """x [..., D] -> [..., D] in the compute dtype; takes no mask."""
        assert mask is None
        x, scale, bias = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        return normalize(x, scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """Returns x [..., D], normed over its last axis in float32, in its own dtype.

    With a bias [D] the mean is subtracted first (LayerNorm), without one it is not (RMSNorm). On CPUs the sums of the
    backward pass are products with ones: XLA's own sums of a product took several times as long there, 7 % of the
    processor time of a training step.

    Args:
      scale: [D].
    """
    unit, inverse = _normed(x, bias is not None, epsilon)
    y = unit * (inverse * scale)
    return (y if bias is None else y + bias).astype(x.dtype)


def _normed(x: jax.Array, center: bool, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x without its mean, if it is to be subtracted, and what brings that to a variance of one; float32."""
    x = x.astype(jnp.float32)
    if center:
        x = x - x.mean(axis=-1, keepdims=True)
    return x, jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float
) -> tuple[jax.Array, _Saved]:
    return normalize(x, scale, bias, epsilon), (x, scale, bias)


def _normalize_backward(
    epsilon: float, saved: _Saved, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, scale, bias = saved
    unit, inverse = _normed(x, bias is not None, epsilon)
    unit, grad = unit * inverse, grad.astype(jnp.float32)
    slope, product = grad * scale, grad * unit
    dx = slope - unit * (_sum_last(product * scale) / x.shape[-1])
    if bias is not None:
        dx -= _sum_last(slope) / x.shape[-1]
    dscale = _sum_rows(product).astype(scale.dtype)
    dbias = None if bias is None else _sum_rows(grad).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


def _sum_last(x: jax.Array) -> jax.Array:
    """[..., D] -> [..., 1]."""
    ones = jnp.ones((x.shape[-1], 1), x.dtype)
    return jax.lax.platform_dependent(x, cpu=lambda x: x @ ones, default=lambda x: x.sum(axis=-1, keepdims=True))


def _sum_rows(x: jax.Array) -> jax.Array:
    """[..., D] -> [D]."""

    def product(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        return jnp.ones(len(rows), x.dtype) @ rows

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(axis=tuple(range(x.ndim - 1))))
