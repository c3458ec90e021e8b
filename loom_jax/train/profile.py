"""Profiling a window of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class ProfileWindow:
    """Records `count` steps from `start` on, into `profile/` of a run folder; TensorBoard's profiler shows them."""

    def __init__(self, workdir: Path, start: int, count: int):
        self._folder, self._first, self._last = workdir / "profile", start, start + count - 1

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wraps one step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == self._last >= self._first:
            # The step was only handed to the device: the trace must hold all of it.
            jax.effects_barrier()
            jax.profiler.stop_trace()
