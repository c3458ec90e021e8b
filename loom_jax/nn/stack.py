"""Layers stacked along a leading axis and run by `lax.scan`, so that compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from loom_jax.core import ConfigError
from loom_jax.nn.attention import ATTENTION_OUTPUT
from loom_jax.nn.projection import LINEAR_OUTPUT

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT, LINEAR_OUTPUT),
    ),
}
"""What a layer keeps for its backward pass: everything, nothing but its input, besides it what attention gave (if the
backend names it), or that and the outputs of its projections."""


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """Returns one module whose parameters hold `num_layers` independent initialisations along a leading axis L."""
    build = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    return build(rngs.split(num_layers))


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs `carry, y = apply(layer, carry, x)` over stacked layers.

    Args:
      layers: a module from `stack_layers`.
      apply: what one layer does; `x` is its slice of `xs`.
      remat: a key of REMAT_POLICIES.

    Returns:
      The last carry and the stacked `y`.

    Raises:
      ConfigError: `remat` is not known.
    """
    if remat not in REMAT_POLICIES:
        raise ConfigError(f"remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    graphdef, params = nnx.split(layers)

    def body(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_params, x = scanned
        return apply(nnx.merge(graphdef, layer_params), carry, x)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (params, xs))
