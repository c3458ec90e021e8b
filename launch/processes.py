"""A job of several processes on one machine, started again where one dies or hangs."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loom_jax.core import STOPPED, ConfigError, LoomError, read_heartbeats, silent_processes
from loom_jax.launch.job import JobDescription

BAD_INPUT = 2
"""Exit status of a command that was given something it cannot use."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds.

    Attributes:
      linger: for the others, after the first process has ended by itself.
      kill: for a process that was asked to end, before it is killed.
      hang: for any sign of life of a training run that has begun; 0 for ever.
    """

    linger: float = 30.0
    kill: float = 10.0
    hang: float = 0.0


class LocalJob:
    """Runs a job, attempt by attempt.

    Args:
      job: what each process runs.
      processes: how many.
      say: gets each line of what the launcher (`launch`) and the processes (`0`, `1`, ...) have to say.
    """

    def __init__(
        self, job: JobDescription, processes: int, patience: Patience = Patience(), say: Callable[[str], None] = print
    ) -> None:
        if processes < 1 or (processes > 1 and not job.shared):
            raise ConfigError(
                f"processes={processes}: `loom {job.command}` is one process; training and `loom convert to-orbax` are "
                "at least one"
            )
        self._job, self._count, self._patience, self._say = job, processes, patience, say
        self._running: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._stopping = False
        self._failures = 0

    def run(self) -> int:
        """Runs until the job is done, and returns the exit status.

        Raises:
          LoomError: it failed more often than it may; what happened is named.
        """
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                status, why = self._attempt()
                if status in (0, BAD_INPUT) or (status == STOPPED and self._stopping):
                    return 0 if status == STOPPED else status
                self._failures += status != STOPPED
                if not self._job.restartable:
                    raise LoomError(why)
                if self._stopping or self._failures > self._job.max_restarts:
                    raise LoomError(f"{why}; it failed {self._failures} times, --max-restarts={self._job.max_restarts}")
                self._tell(f"{why}; starts again from the last checkpoint ({self._failures} failures so far)")
        finally:
            self._end(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def commands(self, port: int = 0) -> list[tuple[dict[str, str], list[str]]]:
        """Returns variables and words of each process."""
        words = [sys.executable if word == "python" else word for word in self._job.words]
        if self._count == 1:
            return [(self._job.variables, words)]
        address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(self._count)}
        gpus = {} if self._job.accelerator == "cpu" else {"JAX_LOCAL_DEVICE_IDS": "{0}"}
        return [
            (
                {
                    **self._job.variables,
                    **address,
                    "JAX_PROCESS_ID": str(number),
                    **{name: form.format(number) for name, form in gpus.items()},
                },
                words,
            )
            for number in range(self._count)
        ]

    def _attempt(self) -> tuple[int, str]:
        """Runs all processes once; returns the status of the job, and in words what ended it."""
        began = time.time()
        self._readers = []
        self._running = []
        for number, (variables, words) in enumerate(self.commands(free_port())):
            process = subprocess.Popen(
                words,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C reaches the launcher, which asks all of them once
            )
            self._running.append(process)
            self._readers.append(threading.Thread(target=self._read, args=(number, process), daemon=True))
            self._readers[-1].start()
            self._tell(f"process {number} has pid {process.pid}")
        if self._stopping:
            self._end(signal.SIGTERM)
        status, why = self._wait(began)
        if any(process.poll() is None for process in self._running):
            self._tell(f"{why}: ending the others")
        self._end(signal.SIGTERM)
        for reader in self._readers:
            reader.join(timeout=5)
        return status, why

    def _wait(self, began: float) -> tuple[int, str]:
        """Waits until the processes have ended, or one of them gives cause to end the others."""
        deadline = None
        while True:
            ended = {n: process.poll() for n, process in enumerate(self._running) if process.poll() is not None}
            bad = {n: status for n, status in ended.items() if status not in (0, STOPPED)}
            if bad:
                number, status = next(iter(bad.items()))
                return int(status or 0), f"process {number} {in_words(int(status or 0))}"
            if len(ended) == self._count:
                stopped = STOPPED in ended.values()
                return (STOPPED, "the job was asked to stop, and has saved") if stopped else (0, "done")
            if ended:
                deadline = deadline or time.monotonic() + self._patience.linger
                if time.monotonic() > deadline:
                    late = [n for n in range(self._count) if n not in ended]
                    return 1, f"process {late[0]} did not end with the others"
            hung = self._hung(began)
            if hung is not None:
                return 1, hung
            time.sleep(0.1)

    def _hung(self, began: float) -> str | None:
        if not self._patience.hang or self._job.workdir is None:
            return None
        beats = [beat for beat in read_heartbeats(Path(self._job.workdir)) if beat.time >= began]
        late = silent_processes(beats, self._patience.hang, time.time()) if len(beats) == self._count else []
        if not late:
            return None
        return f"process {late[0].process} hangs after step {late[0].step}: no step for {self._patience.hang:g} s"

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        """Ends what still runs: asks, and kills what does not listen."""
        deadline = time.monotonic() + self._patience.kill
        for process in self._running:
            if process.poll() is None:
                process.send_signal(how)
        for process in self._running:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(f"[{number}] {line.rstrip()}")

    def _tell(self, text: str) -> None:
        self._say(f"[launch] {text}")


def in_words(status: int) -> str:
    """Returns how a process ended: `was killed by SIGKILL`, `ended with status 1`."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def free_port() -> int:
    """Returns a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
