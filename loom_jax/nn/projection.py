"""Linear maps that may carry a low-rank adapter, or keep their kernel as int8."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

LINEAR_OUTPUT = "linear_output"
"""Name by which a remat policy may keep what linear layers computed: it does not see the product inside."""


@functools.partial(jax.jit, static_argnames="axes")
def quantize_int8(kernel: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values and float32 scales such that values * scales is near the kernel.

    Symmetric, one scale for each output channel: largest magnitude / 127. No weight moves by more than half its scale.

    Args:
      axes: input axes, over which a scale is shared; the scales lack them.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(kernel / scale).astype(jnp.int8), scale.squeeze(axes)


def linear_dot(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """A `dot_general` of linear layers, x [..., in...] and kernel [in..., out...], whose backward pass suits CPUs.

    A kernel's gradient is a product of two activations of which one must be transposed. JAX always transposes the
    gradient, and XLA then fuses the transposition with what the gradient is computed by, such as the slope of an
    activation, at several times the cost on a CPU. Here the narrower of the two is transposed, which in a gated MLP is
    never the one behind the activation.

    Args:
      dimension_numbers: only how many axes are summed over is read: the last of x, the first of the kernel.
      precision, out_sharding: taken for the sake of the signature; None, or they are refused.
    """
    assert precision is None and out_sharding is None
    inner = 1 if dimension_numbers is None else len(dimension_numbers[0][0])
    out = _linear_dot(x, kernel, inner, preferred_element_type or jnp.result_type(x, kernel))
    return checkpoint_name(out, LINEAR_OUTPUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_dot(x: jax.Array, kernel: jax.Array, inner: int, dtype: DTypeLike) -> jax.Array:
    summed = tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner))
    return jax.lax.dot_general(x, kernel, (summed, ((), ())), preferred_element_type=dtype)


def _linear_dot_forward(x: jax.Array, kernel: jax.Array, inner: int, dtype: DTypeLike) -> tuple[jax.Array, Any]:
    return _linear_dot(x, kernel, inner, dtype), (x, kernel)


def _linear_dot_backward(inner: int, dtype: DTypeLike, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad = grad.astype(x.dtype)  # of float32 logits: a product of float32 and bfloat16 would be one of float32
    rows = tuple(range(x.ndim - inner))
    outer = tuple(range(len(rows), grad.ndim)), tuple(range(inner, kernel.ndim))
    dx = jax.lax.dot_general(grad, kernel, (outer, ((), ())), preferred_element_type=dtype)
    if math.prod(kernel.shape[:inner]) <= math.prod(kernel.shape[inner:]):
        dk = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), preferred_element_type=dtype)
    else:
        dk = jax.lax.dot_general(grad, x, ((rows, rows), ((), ())), preferred_element_type=dtype)
        dk = jnp.moveaxis(dk, range(kernel.ndim - inner), range(inner - kernel.ndim, 0))
    return dx.astype(x.dtype), dk.astype(kernel.dtype)


_linear_dot.defvjp(_linear_dot_forward, _linear_dot_backward)


class Projection(nnx.LinearGeneral):
    """nnx.LinearGeneral with an optional low-rank adapter: y = W x + (alpha / rank) B (A x).

    After `quantize` the kernel is int8 and `kernel_scale` float32 [out...]; products are summed in float32 and scaled
    then, so that no kernel of floats is ever held but, at most, that of the layer at work. For inference.
    The adapter is absent until `add_adapter` is called. `lora_a` [in, rank] reads the input axes as one, `lora_b`
    [rank, out...] writes the output axes. Source: LoRA, Hu et al. 2021.
    """

    kernel: nnx.Param[jax.Array]

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, dot_general=linear_dot, **options)

    def add_adapter(self, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        """Adds an adapter that changes nothing yet (B is zero); stacked layers get one each."""
        kernel = self.kernel[...]
        stacked = kernel.ndim - len(self.in_features) - len(self.out_features)
        layers, inputs = kernel.shape[:stacked], math.prod(self.in_features)
        draws = jax.random.normal(rngs.params(), (*layers, inputs, rank), kernel.dtype)
        self.lora_a = nnx.Param(draws * inputs**-0.5)
        self.lora_b = nnx.Param(jnp.zeros((*layers, rank, *self.out_features), kernel.dtype))
        self.lora_scale = alpha / rank

    def merge_adapter(self) -> None:
        """Adds the adapter to the kernel and removes it; the map stays the same up to rounding."""
        kernel, a, b = self.kernel[...], self.lora_a[...], self.lora_b[...]
        delta = self.lora_scale * (a @ b.reshape(*a.shape[:-2], a.shape[-1], -1)).reshape(kernel.shape)
        self.kernel[...] = (kernel + delta).astype(kernel.dtype)
        del self.lora_a, self.lora_b, self.lora_scale

    def quantize(self) -> None:
        """Replaces the kernel by int8 values and scales, see `quantize_int8`; stacked layers have their own scales."""
        kernel = self.kernel[...]
        outputs = kernel.ndim - len(self.out_features)
        values, scale = quantize_int8(kernel, tuple(range(outputs - len(self.in_features), outputs)))
        self.kernel, self.kernel_scale = nnx.Param(values), nnx.Param(scale)

    def _quantized(self, inputs: jax.Array) -> jax.Array:
        dtype, inner = self.dtype, len(self.in_features)
        kernel = self.kernel[...].astype(dtype)
        out = jnp.tensordot(inputs.astype(dtype), kernel, inner, preferred_element_type=jnp.float32)
        out = out * self.kernel_scale[...]
        return (out if self.bias is None else out + self.bias[...]).astype(dtype)

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        quantized = hasattr(self, "kernel_scale")
        out = self._quantized(inputs) if quantized else super().__call__(inputs, *args, **options)
        if not hasattr(self, "lora_a"):
            return out
        a, b = (p[...].astype(out.dtype) for p in (self.lora_a, self.lora_b))
        flat = inputs.reshape(*inputs.shape[: inputs.ndim - len(self.in_features)], -1).astype(out.dtype)
        return out + self.lora_scale * jnp.tensordot(flat @ a, b, axes=1)
