"""Where activations and batches lie: logical names of their axes -> mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import ConfigError
from loom_jax.document import TokenLayout
from loom_jax.parallel.mesh import DATA_AXES

ACTIVATION_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "length": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": (),
}
"""Logical axis of an activation -> the mesh axes that may cut it. Attention reads keys of the whole length: with a
`context` axis the compiler gathers them, while queries stay where they are."""


def activation_spec(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh, *, strict: bool = False
) -> P:
    """Returns how an array is cut; a mesh axis that does not divide its dimension is left out.

    Args:
      names: a key of ACTIVATION_AXES for each dimension, or None for one that is never cut.
      strict: whether a dimension that does not divide is an error instead.

    Raises:
      ConfigError: a name is not known, there are not as many as dimensions, or `strict` fails.
    """
    if len(names) != len(shape):
        raise ConfigError(f"an array of shape {tuple(shape)} has {len(shape)} dimensions, but names {tuple(names)}")
    spec: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in ACTIVATION_AXES:
            raise ConfigError(f"activation axis {name!r} is not one of {', '.join(ACTIVATION_AXES)}")
        cut, parts = [], 1
        for axis in ACTIVATION_AXES[name] if name else ():
            count = mesh.shape.get(axis, 1)
            if count > 1 and size % (parts * count) == 0:
                cut.append(axis)
                parts *= count
            elif count > 1 and strict:
                raise ConfigError(f"{name} size {size} is not a multiple of {parts * count}, the devices that share it")
        spec.append(tuple(cut) or None)
    return P(*spec)


def make_constrain(mesh: Mesh | AbstractMesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """Returns `constrain(x, names)` for the models: places an activation on the mesh by the names of its axes."""

    def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        if mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(x.shape, names, mesh)))

    return constrain


def shard_attend(attend: Callable[..., jax.Array], mesh: Mesh | AbstractMesh) -> Callable[..., jax.Array]:
    """Returns an attention that runs on each device's own rows and heads, with keys of the whole length.

    The compiler cannot cut a kernel by itself, and a decision taken in a loop, such as to skip a block that no query of
    any row needs, would have to be agreed on by all devices.

    Args:
      attend: `attend(q, k, v, q_layout, k_layout)`, as in loom_jax.nn; q [B, Q, H, A], k and v [B, N, K, A].
    """
    if mesh.size == 1:
        return attend

    def sharded(q: jax.Array, k: jax.Array, v: jax.Array, q_layout: TokenLayout, k_layout: TokenLayout) -> jax.Array:
        kv = activation_spec(k.shape, ("batch", None, "kv_heads", None), mesh)
        heads = "heads" if kv[2] else None  # a query head lies with its key head
        queries = activation_spec(q.shape, ("batch", "length", heads, None), mesh)
        layouts = tuple(TokenLayout(*(P(*spec[:2]),) * len(TokenLayout._fields)) for spec in (queries, kv))
        # What a kernel writes is not declared to vary over the mesh, so that is not checked.
        return jax.shard_map(
            attend, mesh=mesh, in_specs=(queries, kv, kv, *layouts), out_specs=queries, check_vma=False
        )(q, k, v, q_layout, k_layout)

    return sharded


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of every leaf of a batch: rows over the data axes, all else whole."""
    return NamedSharding(mesh, P(tuple(axis for axis in DATA_AXES if mesh.shape.get(axis, 1) > 1) or None))


def row_range(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Returns the rows (begin, end) of a batch of `rows` that this process makes; processes that share them make all.

    Raises:
      ConfigError: the rows do not divide over the data axes, or those of this process do not lie together.
    """
    sharding = batch_sharding(mesh)
    activation_spec((rows,), ("batch",), mesh, strict=True)
    places = sharding.addressable_devices_indices_map((rows,)).values()
    parts = {place[0].indices(rows)[:2] for place in places if place is not None}
    begin, end = min(part[0] for part in parts), max(part[1] for part in parts)
    if sum(stop - start for start, stop in parts) != end - begin:
        raise ConfigError(f"mesh {dict(mesh.shape)} gives process {jax.process_index()} rows that do not lie together")
    return begin, end


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns a batch as global arrays, from the rows that each process made (numpy [rows of `row_range`, ...])."""
    sharding = batch_sharding(mesh)

    def place(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, batch)
