"""Shardings of everything that training keeps: parameters, their moving average, the optimizer's moments."""

from __future__ import annotations

from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.parallel.rules import ParamShape, flatten_params, shardings_for


def state_shardings(abstract_state: Any, params: Any, mesh: Mesh | AbstractMesh, preset: str) -> Any:
    """Returns the sharding of every leaf of a training state, in a tree of the same structure.

    A leaf belongs to the parameter whose path ends its own (`optimizer/1/mu/lm_head/kernel`). With the parameter's
    shape it gets its sharding; with all but one of the dimensions, as Adafactor's factored moments, that of the others.
    What is left, counters and placeholders, is whole on every device.

    Args:
      abstract_state: arrays or shapes in any tree, such as loom_jax.train.TrainState.
      params: arrays or shapes of all parameters, trained or not: an nnx.State, nested dicts, or a sequence of such.
      mesh, preset: as for `shardings_for`, which raises ConfigError.
    """
    known: dict[str, tuple[tuple[int, ...], NamedSharding]] = {}
    for part in params if isinstance(params, list | tuple) else [params]:
        shardings, _ = flatten_params(shardings_for(part, mesh, preset))
        known |= {path: (tuple(leaf.shape), shardings[path]) for path, leaf in flatten_params(part)[0].items()}
    leaves, structure = flatten_params(abstract_state)
    whole = NamedSharding(mesh, P())
    return structure.unflatten([_of_leaf(path, leaf, known) or whole for path, leaf in leaves.items()])


def _of_leaf(
    path: str, leaf: ParamShape, known: dict[str, tuple[tuple[int, ...], NamedSharding]]
) -> NamedSharding | None:
    """The sharding that a leaf takes from its parameter, if it has one."""
    names = path.split("/")
    owner = next((known[end] for start in range(len(names)) if (end := "/".join(names[start:])) in known), None)
    if owner is None:
        return None
    shape, sharding = owner
    if tuple(leaf.shape) == shape:
        return sharding
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    for left_out in range(len(shape)):
        if shape[:left_out] + shape[left_out + 1 :] == tuple(leaf.shape):
            return NamedSharding(sharding.mesh, P(*spec[:left_out], *spec[left_out + 1 :]))
    return None
