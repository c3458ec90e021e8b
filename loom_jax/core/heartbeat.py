"""A file for each process of a run, by which it says how far it is, and the reading of them all. Imports no jax."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from typing import Literal

from loom_jax.core.errors import LoomError

HEARTBEATS = "heartbeat"
"""Folder of a run that holds them: `<process>.json`."""

State = Literal["running", "finished", "stopped", "failed"]


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a process said last.

    Attributes:
      process: its number.
      step: the last one that it has begun.
      time: seconds since 1970.
      total_steps: of the run.
      state: `stopped` after a signal, with a checkpoint: the same command goes on from there.
      host, pid: where it runs.
    """

    process: int
    step: int
    time: float
    total_steps: int
    state: State
    host: str
    pid: int


class HeartbeatFile:
    """Writes the heartbeat of one process.

    Args:
      folder: of the run.
      process: number of this process.
      total_steps: of the run.
      every: seconds that must lie between two writes, but for a change of state.
    """

    def __init__(self, folder: Path, process: int, total_steps: int, every: float = 5.0) -> None:
        self._path = folder / HEARTBEATS / f"{process}.json"
        self._process, self._total, self._every = process, total_steps, every
        self._written = -float("inf")
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int, state: State = "running") -> None:
        """Says that `step` has begun, or how the run ended; the file is never half written.

        Raises:
          LoomError: it cannot be written, as on a full disk.
        """
        now = time.monotonic()
        if state == "running" and now - self._written < self._every:
            return
        self._written = now
        said = Heartbeat(self._process, step, time.time(), self._total, state, socket.gethostname(), os.getpid())
        scratch = self._path.with_suffix(f".{said.pid}.part")
        try:
            scratch.write_text(json.dumps(dataclasses.asdict(said)) + "\n", encoding="utf-8")
            scratch.replace(self._path)
        except OSError as error:
            raise LoomError(
                f"{self._path} cannot be written ({error.strerror}): make room or mend the place, and start again"
            ) from error


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Returns the heartbeats in a run folder, by process; one that cannot be read is left out."""
    found = []
    for path in (folder / HEARTBEATS).glob("*.json"):
        try:
            found.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # removed, or of another version: the rest still tell how the run does
    return sorted(found, key=lambda beat: beat.process)


def silent_processes(beats: list[Heartbeat], seconds: float, now: float) -> list[Heartbeat]:
    """Returns the processes by which a running job is held up, where it is.

    The job is held up where no running process has said anything for `seconds`: all of them wait for the slowest. Those
    are the ones at the lowest step, as they are what the others wait for; where all are at one step, those that have
    been silent for longest count.
    """
    running = [beat for beat in beats if beat.state == "running"]
    if not running or now - max(beat.time for beat in running) < seconds:
        return []
    behind = min(beat.step for beat in running)
    last = [beat for beat in running if beat.step == behind]
    if len(last) < len(running):
        return last
    return [min(running, key=lambda beat: beat.time)]
