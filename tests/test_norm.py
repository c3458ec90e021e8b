"""The norms against those of flax, whose backward pass is left to JAX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.nn import LayerNorm, RMSNorm

WIDTH = 12
KINDS = {
    "rms": (RMSNorm, nnx.RMSNorm, {}),
    "layer": (LayerNorm, nnx.LayerNorm, {"use_fast_variance": False}),
}


def drawn(kind: type, dtype: jnp.dtype, **options: bool) -> nnx.Module:
    norm = kind(WIDTH, epsilon=1e-3, dtype=dtype, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)
    norm.scale[...] = jnp.asarray(rng.normal(1.0, 0.3, WIDTH), jnp.float32)
    if isinstance(norm, nnx.LayerNorm):
        norm.bias[...] = jnp.asarray(rng.normal(0.0, 0.3, WIDTH), jnp.float32)
    return norm


def value_and_gradients(norm: nnx.Module, x: jax.Array, weights: jax.Array) -> tuple:
    graph, state = nnx.split(norm)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, state)(x)
        return (y.astype(jnp.float32) * weights).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return y, gradients


@pytest.mark.parametrize("shape", [(WIDTH,), (5, WIDTH), (2, 7, 3, WIDTH)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_and_its_gradients_are_those_of_flax(kind: str, shape: tuple[int, ...]) -> None:
    ours, theirs, options = KINDS[kind]
    rng = np.random.default_rng(2)
    x, weights = (jnp.asarray(rng.normal(0.5, 2.0, shape), jnp.float32) for _ in range(2))
    found = value_and_gradients(drawn(ours, jnp.float32), x, weights)
    wanted = value_and_gradients(drawn(theirs, jnp.float32, **options), x, weights)
    chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_in_bfloat16_computes_in_float32(kind: str) -> None:
    ours, theirs, options = KINDS[kind]
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(0.5, 2.0, (9, WIDTH)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(9, WIDTH)), jnp.float32)
    found = value_and_gradients(drawn(ours, jnp.bfloat16), x, weights)
    wanted = value_and_gradients(drawn(theirs, jnp.bfloat16, **options), x, weights)
    assert found[0].dtype == found[1][1].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found[0], wanted[0])
    chex.assert_trees_all_close(found[1], wanted[1], rtol=2e-2, atol=2e-2)
