"""The log of a run: JSON lines, TensorBoard, and a table on the console. Metrics are read one step late.

Every line of metrics.jsonl is a step with its loss; what else happens is a line of events.ndjson.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax
import numpy as np

from loom_jax.core import LoomError
from loom_jax.train.config import TrainConfig
from loom_jax.train.flops import peak_tflops, training_flops
from loom_jax.train.step import Metrics

COLUMNS: Mapping[str, tuple[str, str]] = {
    "step": ("step", "7d"),
    "loss": ("loss", "8.4f"),
    "ce": ("ce", "8.4f"),
    "mse": ("mse", "8.4f"),
    "grad_norm": ("grad", "8.3g"),
    "learning_rate": ("rate", "8.2e"),
    "step_seconds": ("s/step", "7.3g"),
    "tokens_per_second": ("tok/s", "8,.0f"),
    "data/fill/und": ("und", "4.0%"),
    "data/fill/gen": ("gen", "4.0%"),
    "data_wait_share": ("wait", "4.0%"),
    "mfu": ("MFU", "6.1%"),
    "device_peak_gib": ("GiB", "6.1f"),
}
"""Columns of the console table: key of a line -> heading and format. `und`, `gen`: fill of the streams; `wait`: share
of the time spent waiting for data."""


class TrainLog:
    """Writes what steps report. A step is read when the next one has been handed to the device, so nothing waits.

    Args:
      folder: where metrics.jsonl, events.ndjson and TensorBoard's files go; None in processes that do not write.
      config: of the run.
      names: parameter names, in the order of `Metrics.finite`.
      first: step that the run goes on after; lines of later ones, which a killed run left behind, are dropped.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, names: Sequence[str], first: int = 0):
        self._folder, self._config, self._names = folder, config, [*names, "the loss"]
        self._pending: tuple[int, Metrics, Mapping[str, float]] | None = None
        self._window: list[tuple[float, float, float]] = []
        self._started = time.perf_counter()
        self._waited = 0.0
        self._lines = 0
        self._peak = peak_tflops(jax.devices()[0].device_kind)
        self._metrics = self._events = self._board = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = open_log(folder / "metrics.jsonl", first)
            self._events = open_log(folder / "events.ndjson", first)
            self._board = _event_writer(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        try:
            for file in (self._metrics, self._events, self._board):
                if file is not None:
                    file.close()
        except OSError as failed:
            if kind is None:  # else what ended the run says more
                raise self._cannot_write(failed) from failed

    def waited_for_data(self, seconds: float) -> None:
        """Adds to the time in which the step waited for its batch."""
        self._waited += seconds

    def put(self, step: int, metrics: Metrics, data: Mapping[str, float]) -> None:
        """Takes the metrics of a step that may still be running, and reads those of the step before.

        Raises:
          LoomError: too many steps in a row were not finite (the first tensor is named), or the log cannot be written.
        """
        before, self._pending = self._pending, (step, metrics, dict(data))
        if before is not None:
            self._read(*before)

    def flush(self) -> None:
        """Reads what is still pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    def say(self, text: str) -> None:
        """Prints a line on the console."""
        if self._metrics is not None:
            console().print(text, highlight=False, markup=False, soft_wrap=True)

    def event(self, step: int, name: str, values: Mapping[str, float | str]) -> None:
        """Writes what happened after `step`: `skipped`, `held_out` or `goodput`.

        Raises:
          LoomError: the log cannot be written, as on a full disk.
        """
        self._write(self._events, step, {"event": name, **values})

    def _write(self, file: TextIO | None, step: int, values: Mapping[str, float | str]) -> None:
        """Writes one line of values; null stands for those that are not finite, which JSON does not know."""
        if file is None:
            return
        known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        try:
            file.write(json.dumps({"step": step, **known}) + "\n")
            file.flush()
            for name, value in values.items():
                if isinstance(value, int | float) and self._board is not None:
                    _add_scalar(self._board, name, value, step)
        except OSError as failed:
            raise self._cannot_write(failed) from failed

    def _cannot_write(self, failed: OSError) -> LoomError:
        return LoomError(
            f"the log of the run in {self._folder} cannot be written ({failed.strerror}): make room or mend the place, "
            "and start again; the run goes on from its last checkpoint"
        )

    def _read(self, step: int, metrics: Metrics, data: Mapping[str, float]) -> None:
        values = jax.device_get(metrics)
        tokens = float(values.und_tokens + values.gen_tokens)
        flops = training_flops(self._config.model.decoder, tokens, float(values.squared_lengths))
        self._window.append((float(values.und_tokens), float(values.gen_tokens), flops))
        if values.skipped:
            self._skipped(step, values)
        if step % self._config.watch.log_every == 0 or step == 1:
            self._write(self._metrics, step, self._line(step, values, data))

    def _skipped(self, step: int, values: Metrics) -> None:
        names = [name for name, finite in zip(self._names, values.finite, strict=True) if not finite]
        self.event(step, "skipped", {"not_finite": names[0], "not_finite_count": len(names)})
        self.say(f"step {step} is skipped: {len(names)} tensors are not finite, first {names[0]}")
        if int(values.bad_steps) >= self._config.watch.max_bad_steps:
            raise LoomError(
                f"{int(values.bad_steps)} steps in a row up to step {step} were not finite, first in {names[0]}: "
                f"look at it with --replay-step {step}, lower the learning rate, or raise watch.max_bad_steps"
            )

    def _line(self, step: int, values: Metrics, data: Mapping[str, float]) -> dict[str, float]:
        now = time.perf_counter()
        steps, elapsed = len(self._window), now - self._started
        und, gen, flops = (sum(column) for column in zip(*self._window, strict=True))
        line = {
            "loss": float(values.loss),
            "ce": float(values.ce),
            "mse": float(values.mse),
            "ce_count": float(values.ce_count),
            "mse_count": float(values.mse_count),
            "grad_norm": float(values.grad_norm),
            "learning_rate": float(values.learning_rate),
            "step_seconds": elapsed / steps,
            "tokens_per_second": (und + gen) / elapsed,
            "und_tokens_per_second": und / elapsed,
            "gen_tokens_per_second": gen / elapsed,
            "data_wait_share": self._waited / elapsed,
            "tflops_per_device": flops / elapsed / 1e12 / jax.device_count(),
            **{f"data/{name}": value for name, value in data.items()},
            **_memory(),
        }
        if self._peak is not None:
            line["mfu"] = line["tflops_per_device"] / self._peak
        self._show({"step": step, **line})
        self._window, self._started, self._waited = [], now, 0.0
        return line

    def _show(self, line: Mapping[str, float]) -> None:
        cells = [(title, format(line[key], form)) for key, (title, form) in COLUMNS.items() if key in line]
        if self._lines % 20 == 0:
            self.say(" ".join(f"{title:>{len(cell)}}" for title, cell in cells))
        self._lines += 1
        self.say(" ".join(cell for _, cell in cells))


def open_log(path: Path, step: int) -> TextIO:
    """Opens a log to write at its end, after it removed lines of steps after `step`, and one that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)
    return path.open("a", encoding="utf-8")


def console() -> Any:
    """Returns where lines for people go; once nobody reads them they are dropped: training goes on."""
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            """What rich does, but for ending the process."""
            with contextlib.suppress(SystemExit):
                super().on_broken_pipe()

    return Lasting()


def _memory() -> dict[str, float]:
    """Peak bytes of the first device, where it can tell."""
    stats = jax.local_devices()[0].memory_stats()
    return {"device_peak_gib": stats["peak_bytes_in_use"] / 2**30} if stats and "peak_bytes_in_use" in stats else {}


def _event_writer(folder: Path) -> Any:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder / "tensorboard"))


def _add_scalar(writer: Any, name: str, value: float, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, simple_value=float(np.float32(value)))])
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
