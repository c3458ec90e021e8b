"""Starting a job of several processes."""

from __future__ import annotations

import os

import jax

from loom_jax.core import ConfigError

_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_LISTS = ("TPU_WORKER_HOSTNAMES",)


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
) -> bool:
    """Joins this process to its job; must come before the first use of a device. Alone, a process joins nothing.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where these are not
    set either, but SLURM, Open MPI or a TPU pod says that there are several processes, jax finds out the rest itself.

    Args:
      coordinator: `host:port` of process 0.
      heartbeat_seconds: how long a process may be silent before the others give up.

    Returns:
      Whether the process joined a job of several.

    Raises:
      ConfigError: only some of the three are known, or one is no number.
    """
    given = {
        "JAX_COORDINATOR_ADDRESS": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "JAX_NUM_PROCESSES": _number("JAX_NUM_PROCESSES", num_processes),
        "JAX_PROCESS_ID": _number("JAX_PROCESS_ID", process_id),
    }
    missing = [name for name, value in given.items() if value is None]
    if given["JAX_NUM_PROCESSES"] == 1:
        return False
    if not missing:
        address, count, number = given.values()
        jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=heartbeat_seconds)
        return True
    if len(missing) < len(given):
        known = ", ".join(name for name in given if name not in missing)
        raise ConfigError(f"{known} given without {', '.join(missing)}: a job of several processes needs all three")
    if not _cluster_says_several():
        return False
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
    return True


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(name)
    if given is not None or text is None:
        return given
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is no number")
    return int(text)


def _cluster_says_several() -> bool:
    counts = [os.environ.get(name, "") for name in _COUNTS]
    hosts = [os.environ.get(name, "").split(",") for name in _LISTS]
    return any(text.isdigit() and int(text) > 1 for text in counts) or any(len(names) > 1 for names in hosts)
