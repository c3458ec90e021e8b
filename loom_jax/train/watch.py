"""What a run tells about itself: a heartbeat, whether copies drifted, and in the end where its time went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Mesh

from loom_jax.core import HeartbeatFile, LoomError, read_heartbeats
from loom_jax.train.config import TrainConfig
from loom_jax.train.drift import DriftCheck
from loom_jax.train.goodput import Goodput, Part
from loom_jax.train.log import TrainLog


class Watch:
    """Wraps a run; as a context manager it writes how the run ended.

    Make it when the job starts, call `begin` before the first step, and enter it around the checkpoints, so that the
    time in which the last one is written counts.
    """

    def __init__(self, workdir: Path, config: TrainConfig) -> None:
        self._workdir, self._config = workdir, config
        self._goodput = Goodput()
        self._step = 0

    def begin(self, first: int, mesh: Mesh, log: TrainLog) -> Self:
        """The step after `first` comes next; returns itself."""
        number = jax.process_index()
        earlier = [beat for beat in read_heartbeats(self._workdir) if beat.process == number]
        self._goodput.begin(max((beat.step for beat in earlier), default=0))
        self._heartbeat = HeartbeatFile(self._workdir, number, self._config.total_steps)
        self._drift = DriftCheck(mesh, self._config.watch.drift_every)
        self._log, self._step = log, first
        self._heartbeat.beat(first)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._goodput.close()
        if kind is not None:
            with contextlib.suppress(LoomError):  # what ended the run says more than that this cannot be written
                self._heartbeat.beat(self._step, "failed")
            return
        shares = {f"goodput/{name}": share for name, share in self._goodput.shares().items()}
        self._log.event(self._step, "goodput", shares)
        self._heartbeat.beat(self._step, "finished" if self._step == self._config.total_steps else "stopped")

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Counts what happens inside as time for `name`."""
        with self._goodput.part(name):
            yield

    def stepped(self, step: int, state: Any) -> None:
        """Step `step` was handed to the devices and left `state`.

        Raises:
          LoomError: copies of the state differ; the process is named.
        """
        self._step = step
        self._goodput.stepped(step)
        self._heartbeat.beat(step)
        if self._drift.due(step):
            jax.block_until_ready(state)  # the step at hand is no part of the measurement
            with self._goodput.part("measure"):
                self._drift.check(step, state)
