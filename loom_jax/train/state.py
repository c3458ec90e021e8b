"""The state of a training job, and which of its parameters are trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loom_jax.core import ConfigError
from loom_jax.parallel import flatten_params
from loom_jax.train.config import EmaConfig, TrainConfig
from loom_jax.train.optimizer import apply_updates

ALWAYS_FROZEN = ("vit_pos_embed/table", "latent_pos_embed/table", "vit/layers/k_proj/bias")
"""Fixed tables, and SigLIP's key bias: its gradient is zero but for rounding, by which AdamW would let it drift."""


class TrainState(NamedTuple):
    """All that a step changes, and the frozen parameters. `ema` is None where it is off."""

    step: jax.Array
    """int32 []: steps taken, skipped ones included."""
    trainable: nnx.State
    frozen: nnx.State
    ema: nnx.State | None
    optimizer: optax.OptState
    bad_steps: jax.Array
    """int32 []: steps in a row that were skipped."""
    skipped: jax.Array
    """int32 []: steps that were skipped in all."""


def trainable_filter(config: TrainConfig) -> Callable[[tuple[Any, ...], Any], bool]:
    """Returns the nnx filter of parameters that are trained: with LoRA its adapters alone."""
    frozen = (*config.frozen, *ALWAYS_FROZEN)

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        name = "/".join(map(str, path))
        if config.lora.rank:
            return name.rsplit("/", 1)[-1] in ("lora_a", "lora_b")
        return not any(fnmatch.fnmatch(name, pattern) for pattern in frozen)

    return is_trained


def check_frozen(config: TrainConfig, params: nnx.State) -> None:
    """Raises ConfigError where a pattern of `config.frozen` fits no parameter: it would freeze nothing."""
    names = parameter_names(params)
    for pattern in config.frozen:
        if not fnmatch.filter(names, pattern):
            known = ", ".join(sorted({name.split("/")[0] for name in names}))
            raise ConfigError(f"frozen pattern {pattern!r} fits no parameter: paths begin with {known}")


def split_model(model: nnx.Module, config: TrainConfig) -> tuple[Any, nnx.State, nnx.State]:
    """Returns (graphdef, trainable, frozen)."""
    return nnx.split(model, trainable_filter(config), ...)


def init_state(
    trainable: nnx.State, frozen: nnx.State, optimizer: optax.GradientTransformation, ema: EmaConfig
) -> TrainState:
    """Returns the state before the first step: the moving average begins at the parameters."""
    average = None
    if ema.decay > 0:
        average = jax.tree.map(lambda a: a.astype(ema.dtype), trainable)
    # Three arrays, not one three times: a buffer can be donated only once.
    step, bad_steps, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, trainable, frozen, average, optimizer.init(trainable), bad_steps, skipped)


def update_ema(ema: Any, params: Any, decay: float, key: jax.Array) -> Any:
    """Returns decay ema + (1 - decay) params, computed in float32 and kept in the dtype of `ema`; None for None.

    In bfloat16 it is rounded stochastically with `key`: at 0.9999 an average rounded to the nearest would never move.
    """
    if ema is None:
        return None

    def towards(average: jax.Array, param: jax.Array) -> jax.Array:
        return (1 - decay) * (param.astype(jnp.float32) - average.astype(jnp.float32))

    return apply_updates(ema, jax.tree.map(towards, ema, params), key)


def parameter_names(tree: Any) -> list[str]:
    """Returns the path of every parameter of a state, in leaf order."""
    return list(flatten_params(tree)[0])
