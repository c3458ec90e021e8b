"""Low-rank adapters on the projections of a model: adding them, and merging them before export."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from loom_jax.core import ConfigError
from loom_jax.nn import Projection


def add_lora(model: nnx.Module, rank: int, alpha: float, targets: Sequence[str], rngs: nnx.Rngs) -> list[str]:
    """Adds an adapter of `rank` to every projection that a target names; returns their paths.

    Args:
      targets: names of projections (`q_proj`) or patterns of whole paths (`decoder/layers/gen/*`).

    Raises:
      ConfigError: a target names no projection.
    """
    found = dict(_projections(model))
    for target in targets:
        if not any(_names(path, target) for path in found):
            known = sorted({path.rsplit("/", 1)[-1] for path in found})
            raise ConfigError(f"lora target {target!r} names no projection: there are {', '.join(known)}")
    chosen = [path for path in found if any(_names(path, target) for target in targets)]
    for path in chosen:
        found[path].add_adapter(rank, alpha, rngs)
    return chosen


def merge_lora(model: nnx.Module) -> None:
    """Adds all adapters of a model to their kernels and removes them."""
    for _, projection in _projections(model):
        if hasattr(projection, "lora_a"):
            projection.merge_adapter()


def _projections(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Projection):
            yield "/".join(map(str, path)), module


def _names(path: str, target: str) -> bool:
    return path.rsplit("/", 1)[-1] == target or fnmatch.fnmatch(path, target)
