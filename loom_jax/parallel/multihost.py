"""Jobs of several processes: how one joins, and how all agree to stop."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import InputError, LoomError
from loom_jax.parallel.schedulers import find_place

SHUTDOWN_SECONDS = 60
"""How long a process that ends waits for the others: one that failed must not keep them, nor be kept, for long."""
ECHO_SECONDS = 2.0
"""How long after a signal to stop others are its echo, not a second thought."""


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
) -> bool:
    """Joins this process to its job; must come before the first use of a device. Alone, a process joins nothing.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what these do not
    say from SLURM, Open MPI, an indexed Kubernetes Job or a TPU pod; see `find_place`. A second call changes nothing.

    Args:
      coordinator: `host:port` of process 0, or `auto` where the metadata of a Cloud TPU machine are to be asked.
      heartbeat_seconds: how long a process may be silent before the others give up.

    Returns:
      Whether the process belongs to a job of several.

    Raises:
      ConfigError: only some of the three are known, or one is no number.
    """
    if jax.distributed.is_initialized():
        return True
    place = find_place(os.environ, coordinator, num_processes, process_id)
    if place is None:
        return False
    if place.found_by == "tpu":
        jax.distributed.initialize(
            heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
        _label_log_lines()
        return True
    # By itself jax would give a task of SLURM one device, also where the task is the only one of its machine.
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.number,
        place.local_devices,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    _label_log_lines()
    # Between CPUs the first collective fails where one process comes to it half a minute after another, as one may that
    # compiles what the other finds in the cache. Later ones wait.
    multihost_utils.sync_global_devices("joined")
    return True


def _label_log_lines() -> None:
    """Lets every line of Python's logging begin with the number of this process, whoever writes it."""
    make, label = logging.getLogRecordFactory(), f"[process {jax.process_index()}/{jax.process_count()}]"

    def labelled(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg = f"{label} {record.msg}"
        return record

    logging.setLogRecordFactory(labelled)


def gather(value: Any) -> list[Any]:
    """Returns what each process of a job gives, in the order of their numbers; all make the same call.

    Args:
      value: what JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int64(len(text)))))
    # JSON may end in spaces, so they fill the shorter texts.
    filled = np.full(longest, ord(" "), np.uint8)
    filled[: len(text)] = text
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(filled))]


class ElsewhereError(LoomError):
    """Another process of the job failed, and says why by itself.

    Attributes:
      bad_input: whether it was given something that it cannot use.
    """

    def __init__(self, message: str, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lets a block fail in all processes of a job where it fails in one; inside it none waits for another.

    Raises:
      ElsewhereError: in every process but the first that failed, which raises its own error.
      LoomError: a process has ended without a word.
    """
    try:
        yield
    except Exception as error:
        _agree(error)
        raise
    _agree(None)


def _agree(error: Exception | None) -> None:
    """Raises ElsewhereError where a process failed, but in the first that did; LoomError where one has gone."""
    own = None if error is None else [f"{type(error).__name__}: {error}", isinstance(error, InputError)]
    try:
        said = gather(own)
    except (ValueError, RuntimeError) as lost:  # jax raises either where a connection ends
        raise LoomError("another process of the job was killed or lost its connection: see its own lines") from lost
    first = next((number for number, words in enumerate(said) if words is not None), jax.process_index())
    if first != jax.process_index():
        raise ElsewhereError(f"process {first} failed: {said[first][0]}", said[first][1]) from error


class PreemptionNotice:
    """Notes a signal to stop, instead of dying of it, and lets all processes of a job stop after the same step.

    While the `with` block lasts, the first of the signals sets a flag, and those that follow at once are the same
    notice: who sends one to a process and then to its group, as `timeout` does, means one. A later one acts as if there
    were no block. A signal that the process ignores, as a shell makes its background jobs ignore SIGINT, stays ignored.

    Args:
      signals: by default SIGTERM, which clusters send before they take a machine away, and SIGINT, a Ctrl-C.
      echo_seconds: how long signals after the first count as the same notice.
    """

    def __init__(
        self,
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT),
        echo_seconds: float = ECHO_SECONDS,
    ) -> None:
        self.signals, self.echo_seconds = signals, echo_seconds
        self.received = False
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._asked: jax.Array | None = None

    def __enter__(self) -> Self:
        for number in self.signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # None stands for a handler that was not set from Python, as that of jax.distributed.
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
            if number == signal.SIGINT:
                with contextlib.suppress(OSError):  # nobody may read it; print must not be used in a handler
                    os.write(2, b"asked to stop: saves after this step; Ctrl-C again, seconds later, ends without\n")
        elif time.monotonic() - self._first > self.echo_seconds:
            self._restore()
            os.kill(os.getpid(), number)

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
