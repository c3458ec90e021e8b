"""Where the time of a run goes: steps, compiling, waiting for data, saving, measuring, and starting again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import jax

Part = Literal["data", "save", "measure"]

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Goodput:
    """A clock that starts when it is made. What is in no part, after `begin`, is time in steps.

    Compiling counts as compiling wherever it happens. Steps that an earlier attempt had already begun count as restart,
    as does all that comes before the first step.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds = {"restart": 0.0, "data": 0.0, "save": 0.0, "measure": 0.0}
        self._compiled: list[tuple[float, float]] = []
        self._mark: float | None = None
        self._repeat_until = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event not in _COMPILE_EVENTS:
            return
        now = self._elapsed()
        start = now - duration_secs
        # What was traced or compiled inside is reported first.
        while self._compiled and self._compiled[-1][0] >= start:
            self._compiled.pop()
        self._compiled.append((start, now))

    @property
    def _compiling(self) -> float:
        return sum(end - start for start, end in self._compiled)

    def close(self) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def begin(self, repeat_until: int = 0) -> None:
        """The first step is about to begin; those up to `repeat_until` were done before, and lost."""
        self._seconds["restart"] = self._elapsed() - self._compiling
        self._repeat_until = repeat_until
        self._mark = self._steps()

    def stepped(self, step: int) -> None:
        """Step `step` has ended."""
        if step <= self._repeat_until and self._mark is not None:
            steps = self._steps()
            self._seconds["restart"] += steps - self._mark
            self._mark = self._steps()

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Counts what happens inside as `name`."""
        began, compiling = time.perf_counter(), self._compiling
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began - (self._compiling - compiling)

    def shares(self) -> dict[str, float]:
        """Returns each part's share of the time so far; together they are 1."""
        elapsed = self._elapsed()
        parts = {"step": self._steps(), "compile": self._compiling, **self._seconds}
        return {name: max(0.0, seconds) / elapsed for name, seconds in parts.items()}

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _steps(self) -> float:
        return self._elapsed() - self._compiling - sum(self._seconds.values())
