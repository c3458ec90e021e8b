"""Do all copies of the parameters still hold the same bits? A device or a host that drifted is named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import LoomError
from loom_jax.parallel import flatten_params


class DriftCheck:
    """Compares a hash of every part of a state between the devices that hold copies of it.

    The hashes are computed where the parts lie, 4 bytes an array and device; only they go between hosts. Parts of which
    there is one copy cannot be compared.

    Args:
      mesh: on which the state lies.
      every: steps between two checks; 0 for never.
    """

    def __init__(self, mesh: Mesh, every: int) -> None:
        self._mesh, self._every = mesh, every
        self._hashes: Any = None

    def due(self, step: int) -> bool:
        """Whether there is something to compare after `step`."""
        return self._every > 0 and self._mesh.size > 1 and step % self._every == 0

    def check(self, step: int, state: Any) -> None:
        """Compares; all processes of the job make the same call.

        Raises:
          LoomError: copies differ; the process, its devices and the first array are named.
        """
        leaves = {name: leaf for name, leaf in flatten_params(state)[0].items() if isinstance(leaf, jax.Array)}
        arrays = [leaf for leaf in leaves.values() if isinstance(leaf.sharding, NamedSharding)]
        if self._hashes is None:
            self._hashes = _hash_program(self._mesh, arrays)
        places = [leaf.sharding.devices_indices_map(leaf.shape) for leaf in arrays]
        names = [name for name, leaf in leaves.items() if isinstance(leaf.sharding, NamedSharding)]
        found = np.asarray(jax.device_get(self._hashes(arrays)))
        devices = list(self._mesh.devices.flat)
        odd = odd_copies(found, [[places[i][device] for device in devices] for i in range(len(names))])
        if not odd:
            return
        first, numbers = next(iter(odd.items()))
        processes = sorted({devices[number].process_index for number in numbers})
        raise LoomError(
            f"step {step}: {len(odd)} arrays of the state are no longer the same on all devices, first {names[first]}: "
            f"process {', '.join(map(str, processes))} (device {', '.join(str(devices[n].id) for n in numbers)}) holds "
            "other bits than the rest; take its machine out, and go on from the last checkpoint"
        )


def odd_copies(hashes: np.ndarray, places: Sequence[Sequence[Any]]) -> Mapping[int, list[int]]:
    """Returns array -> devices whose copy differs from what most devices hold; of two copies that differ, both.

    Args:
      hashes: uint32 [devices, arrays].
      places: for each array, the slices that each device holds.
    """
    odd: dict[int, list[int]] = {}
    for array, slices in enumerate(places):
        groups = defaultdict(list)
        for device, place in enumerate(slices):
            groups[str(place)].append(device)
        for copies in groups.values():
            (common, times), *others = Counter(int(hashes[device, array]) for device in copies).most_common()
            if others:
                tie = others[0][1] == times
                odd.setdefault(array, []).extend(d for d in copies if tie or hashes[d, array] != common)
    return odd


def _hash_program(mesh: Mesh, arrays: Sequence[jax.Array]) -> Any:
    """Returns a compiled function: arrays -> their hashes on every device, uint32 [devices, arrays]."""

    def local(*parts: jax.Array) -> jax.Array:
        return jnp.stack([_hash(part) for part in parts])[None]

    specs = tuple(leaf.sharding.spec for leaf in arrays)  # type: ignore[attr-defined]
    hashed = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)
    return jax.jit(lambda parts: hashed(*parts), out_shardings=NamedSharding(mesh, P()))


def _hash(part: jax.Array) -> jax.Array:
    """A sum of the bits, uint32 []; each element is weighed by its place, so that changed places are seen."""
    if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
        part = jax.random.key_data(part)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    bits = part if part.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(part, width)
    flat = bits.reshape(-1).astype(jnp.uint32)
    weights = jax.lax.iota(jnp.uint32, flat.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(flat * weights, dtype=jnp.uint32)
