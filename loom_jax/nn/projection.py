"""Linear maps that may carry a low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Projection(nnx.LinearGeneral):
    """nnx.LinearGeneral with an optional low-rank adapter: y = W x + (alpha / rank) B (A x).

    The adapter is absent until `add_adapter` is called. `lora_a` [in, rank] reads the input axes as one, `lora_b`
    [rank, out...] writes the output axes. Source: LoRA, Hu et al. 2021.
    """

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

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        out = super().__call__(inputs, *args, **options)
        if not hasattr(self, "lora_a"):
            return out
        a, b = (p[...].astype(out.dtype) for p in (self.lora_a, self.lora_b))
        flat = inputs.reshape(*inputs.shape[: inputs.ndim - len(self.in_features)], -1).astype(out.dtype)
        return out + self.lora_scale * jnp.tensordot(flat @ a, b, axes=1)
