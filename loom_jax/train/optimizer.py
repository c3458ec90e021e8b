"""The optimizer: schedules, AdamW with the original's settings, Adafactor, Muon, moments and masters in bfloat16."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.parallel import flatten_params
from loom_jax.train.config import OptimizerConfig

NO_DECAY = ("scale", "bias", "table", "embedding")
"""Last names of parameters that never decay: norms, biases, tables."""
MATRICES = (
    (re.compile(r"(.*/)?layers/(.*/)?[qkv]_proj/kernel"), ((1,), (2, 3))),
    (re.compile(r"(.*/)?layers/(.*/)?(o_proj|out_proj)/kernel"), ((1, 2), (3,))),
    (re.compile(r"(.*/)?layers/(.*/)?(gate_proj|up_proj|down_proj|fc1|fc2)/kernel"), ((1,), (2,))),
)
"""Paths of kernels [L, in..., out...] of layers, that Muon treats as matrices, all heads as one: input, output axes."""


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the schedule of spec section 9. As in the original, cosine rises again beyond its last step."""
    last = config.decay_steps or total_steps

    def at(step: Any) -> jax.Array:
        warming = step < config.warmup_steps
        warm = step / max(1, config.warmup_steps)
        if config.schedule == "constant":
            return config.learning_rate * jnp.where(warming, warm, 1.0)
        least = config.min_learning_rate / config.learning_rate
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        falling = jnp.maximum(0.0, (1 - least) * 0.5 * (1 + jnp.cos(jnp.pi * progress)) + least)
        return config.learning_rate * jnp.where(warming, warm, falling)

    return at


def make_optimizer(
    config: OptimizerConfig, total_steps: int, mesh: Mesh | AbstractMesh | None = None
) -> optax.GradientTransformation:
    """Returns clipping by global norm, then the optimizer; its updates are added to the parameters.

    Args:
      mesh: devices over which Muon deals out the layers; without it each of them works through all that it holds.
    """
    rate = learning_rate(config, total_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    parts = [keep_state_in(clip, jnp.dtype(jnp.float32))]
    if config.name == "adafactor":
        mask = decay_mask if config.weight_decay else None
        decay = config.weight_decay or None
        parts.append(
            optax.adafactor(rate, weight_decay_rate=decay, weight_decay_mask=mask, multiply_by_parameter_scale=False)
        )
    elif config.name == "muon":
        parts.append(_by_path(_muon(config, rate), _deal_layers(mesh)))
    else:
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
        parts.append(keep_state_in(adam, jnp.dtype(config.moment_dtype)))
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
        parts.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*parts)


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the matrices of layers, Nesterov's Adam for the rest, over {path: leaf}; rates are as for Adam.

    Source: Liu et al., Muon is Scalable for LLM Training (2025), section 2.2.
    """

    def axes(params: Any) -> Any:
        return {path: _matrix_axes(path) for path in params}

    return optax.contrib.muon(
        rate,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=axes,
        consistent_rms=0.2,
    )


def _matrix_axes(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    axes = next((axes for pattern, axes in MATRICES if pattern.fullmatch(path)), None)
    return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)


def _deal_layers(mesh: Mesh | AbstractMesh | None) -> Callable[[str, jax.Array], jax.Array]:
    """Returns a function (path, gradient) that lays matrices of whole layers on devices: each iterates on its own ones.

    Products of matrices that are cut, or that every device holds, would be waited for, or made by all alike.
    """
    if mesh is None or mesh.size == 1:
        return lambda path, leaf: leaf
    by_layer = NamedSharding(mesh, P(mesh.axis_names))

    def place(path: str, leaf: jax.Array) -> jax.Array:
        return leaf if _matrix_axes(path) is None else jax.lax.with_sharding_constraint(leaf, by_layer)

    return place


def _by_path(
    inner: optax.GradientTransformation, place: Callable[[str, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Hands `inner` a dict of path -> leaf in place of a tree of modules, with gradients where `place` puts them."""

    def init(params: Any) -> Any:
        return inner.init(flatten_params(params)[0])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, structure = flatten_params(updates)
        new: Any
        leaves = {path: place(path, leaf) for path, leaf in leaves.items()}
        new, state = inner.update(leaves, state, None if params is None else flatten_params(params)[0])
        return structure.unflatten([new[path] for path in leaves]), state

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """Returns a tree of bools: True at parameters that may decay, by the last name of their path."""
    leaves, structure = flatten_params(params)
    return jax.tree_util.tree_unflatten(structure, [path.rsplit("/", 1)[-1] not in NO_DECAY for path in leaves])


def keep_state_in(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Keeps the float state of `inner` in `dtype` between steps, and computes in float32 whatever gradients come in."""

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """Adds updates to master parameters; those in bfloat16 with stochastic rounding, or small updates would vanish."""
    leaves, structure = jax.tree.flatten(params)
    deltas = jax.tree.leaves(updates)
    out = []
    for number, (param, delta) in enumerate(zip(leaves, deltas, strict=True)):
        total = param.astype(jnp.float32) + delta.astype(jnp.float32)
        if param.dtype == jnp.bfloat16:
            total = round_stochastically(total, jax.random.fold_in(key, number))
        out.append(total.astype(param.dtype))
    return jax.tree.unflatten(structure, out)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, the nearer one more likely, so that the mean stays."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
