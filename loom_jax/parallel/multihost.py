"""Jobs of several processes: how one joins, and how all agree to stop."""

from __future__ import annotations

import functools
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES", num_processes)
    number = _number("JAX_PROCESS_ID", process_id)
    if count == 1:
        return False
    if address is not None and count is not None and number is not None:
        jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=heartbeat_seconds)
        return True
    known = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": number}
    missing = [name for name, value in known.items() if value is None]
    if len(missing) < len(known):
        given = ", ".join(name for name in known if name not in missing)
        raise ConfigError(f"{given} given without {', '.join(missing)}: a job of several processes needs all three")
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


class PreemptionNotice:
    """Notes a signal to stop, instead of dying of it, and lets all processes of a job stop after the same step.

    While the `with` block lasts, the first of the signals sets a flag; a second one acts as if there were no block.

    Args:
      signals: by default SIGTERM, which clusters send before they take a machine away.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        self._asked: jax.Array | None = None

    def __enter__(self) -> Self:
        for number in self.signals:
            # None stands for a handler that was not set from Python, as that of jax.distributed.
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now. All processes of a job call it after every step and get the same answer.

        One process answers at once. Of several, any may have got the signal: the answer is that to the call before, so
        that no process waits for a step to end.
        """
        if jax.process_count() == 1:
            return self.received
        before, self._asked = self._asked, _any_process(self.received)
        return before is not None and bool(before)


def _any_process(flag: bool) -> jax.Array:
    """Whether `flag` is set in any process; bool [] on every device, not waited for."""
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    local = np.full(jax.local_device_count(), flag)
    flags = jax.make_array_from_process_local_data(NamedSharding(mesh, P("device")), local)
    return _reduce(NamedSharding(mesh, P()))(flags)


@functools.lru_cache
def _reduce(where: NamedSharding) -> Any:
    return jax.jit(jnp.any, out_shardings=where)
