"""The curves of training runs as a picture: a panel for each loss, a line for each run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax.core import InputError

PANELS = {
    "ce": "cross-entropy of text",
    "mse": "squared error of the velocity",
    "pixel_error": "mean error of a decoded pixel",
    "loss": "loss",
}
"""Key of a line of the log -> title. `loss` is drawn where a run has none of the others."""
ENDINGS = (".png", ".svg", ".pdf")
SMOOTH = 50
"""About so many points of a run are drawn strongly, each the mean of those around it."""

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Key -> steps and values."""


def plot_runs(runs: Mapping[str, Path], file: Path) -> None:
    """Draws the losses of runs, and dashed those of held-out rows.

    Args:
      runs: name -> folder.
      file: where the picture goes; its ending says of what kind it is.

    Raises:
      InputError: the ending is not known, no run has a line of log, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    if file.suffix not in ENDINGS:
        raise InputError(f"--plot {file}: must end in {', '.join(ENDINGS)}")
    found = {name: read_series(folder) for name, folder in runs.items()}
    panels = [key for key in PANELS if any(key in series for series in found.values())]
    if not panels:
        raise InputError("--plot: none of these runs has logged a step yet")
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for number, (name, series) in enumerate(found.items()):
            _draw(axes, series, key, name, f"C{number % 10}")
        axes.set(title=PANELS[key], xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise InputError(f"--plot {file}: cannot be written ({error.strerror}): choose another file") from error


def _draw(axes: Any, series: Series, key: str, name: str, colour: str) -> None:
    if key in series:
        steps, values = series[key]
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        width = max(1, len(values) // SMOOTH)
        whole = len(values) // width * width
        axes.plot(*(a[:whole].reshape(-1, width).mean(axis=1) for a in (steps, values)), color=colour, label=name)
    if f"held_out/{key}" in series:
        axes.plot(*series[f"held_out/{key}"], color=colour, linestyle="--", label=f"{name}, held out")


def read_series(folder: Path) -> Series:
    """Returns the losses of a run, and those of held-out rows; steps that were logged twice count once."""
    lines = _lines(folder / "metrics.jsonl")
    own = ("pixel_error",) if any("pixel_error" in line for line in lines) else ("ce", "mse")  # an autoencoder's alone
    keys = [key for key in own if any(line.get(key) for line in lines)] or ["loss"]
    out = {key: _column(lines, key) for key in keys}
    events = [line for line in _lines(folder / "events.ndjson") if line.get("event") == "held_out"]
    out |= {f"held_out/{key}": _column(events, f"held_out/{key}") for key in keys}
    return {key: column for key, column in out.items() if len(column[0])}


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that is cut off, as the run is writing it, is left out."""
    out: list[dict[str, Any]] = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            out.append(json.loads(text))
        except ValueError:
            continue
    return out


def _column(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    values = {line["step"]: line[key] for line in lines if "step" in line and line.get(key) is not None}
    return _arrays(list(values)), _arrays(list(values.values()))


def _arrays(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, np.float64)
