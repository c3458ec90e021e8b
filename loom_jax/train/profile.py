"""Profiling a window of steps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class ProfileWindow:
    """Records `count` steps from `start` on, into `profile/` of a run folder; TensorBoard's profiler shows them.

    A run that begins within the window records the rest of it, one that ends within it what there was.
    """

    def __init__(self, workdir: Path, start: int, count: int):
        self._folder, self._first, self._last = workdir / "profile", start, start + count - 1
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Begins the recording where `step` is the first of the window; returns a context for the call of the step."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, results: Any) -> None:
        """Ends the recording after the last step of the window, once its results are there."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
