"""Reports: one HTML page that needs nothing beside it, and the same figures as JSON."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image as PILImage

from loom_jax.core import LoomError
from loom_jax.data.world import SIDE, encode_png, read_pictures, render
from loom_jax.evaluate.metrics import (
    METRICS,
    Measurement,
    Outcome,
    Score,
    read_plan,
    shows,
    summarise,
    summarise_kinds,
)
from loom_jax.evaluate.suite import WorldSuite

SCHEMA = 2
SCORES, MEASUREMENTS, PAGE, SHEET = "scores.json", "measurements.jsonl", "report.html", "samples.png"
_COLOURS = {"train": "#8c8c94", "train_long": "#5b5b63", "test": "#2f5fd0", "long": "#d97a1a"}
_PLOTTED = ("step", "plan", "sequence", "f1", "consistency")


def write_report(
    folder: Path,
    suite: WorldSuite,
    outcomes: Sequence[Outcome],
    measurements: Sequence[Measurement],
    run: Mapping[str, Any],
    samples: int = 4,
) -> list[Path]:
    """Writes `report.html`, `scores.json`, `measurements.jsonl` and `samples.png`; returns their paths.

    Args:
      folder: is made, if it is not there.
      suite: what was asked.
      outcomes: what was made.
      measurements: of them.
      run: facts about the run, as JSON: checkpoint, settings, times.
      samples: requests that the page shows of each task and split, right and wrong ones; the picture shows two.

    Raises:
      LoomError: they cannot be written.
    """
    scores, kinds = summarise(measurements), summarise_kinds(measurements)
    facts = {**run, "suite": describe_suite(suite)}
    page = render_page(outcomes, scores, kinds, facts, samples)
    entries = {"scores": list(map(score_entry, scores)), "kinds": list(map(score_entry, kinds))}
    texts = {
        SCORES: json.dumps({"schema": SCHEMA, **facts, **entries}, indent=1) + "\n",
        MEASUREMENTS: "".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in measurements),
        PAGE: page,
    }
    groups = dict.fromkeys((outcome.split, outcome.example.task) for outcome in outcomes)
    sheet = sample_sheet([outcome for group in groups for outcome in _choose(outcomes, *group, count=2)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        sheet.save(folder / SHEET)
    except OSError as error:
        raise LoomError(f"{folder}: cannot be written to ({error.strerror}): choose another folder") from error
    return [folder / name for name in (*texts, SHEET)]


def describe_suite(suite: WorldSuite) -> dict[str, Any]:
    """Returns the settings of a suite as JSON."""
    return {**dataclasses.asdict(suite), "history": None if suite.history is None else str(suite.history)}


def score_entry(score: Score) -> dict[str, Any]:
    """Returns a score as JSON."""
    place: dict[str, Any] = {"split": score.split, "task": score.task, "metric": score.metric}
    place |= {"turn": score.turn} if score.kind is None else {"kind": score.kind}
    return {**place, **dataclasses.asdict(score.interval)}


def render_page(
    outcomes: Sequence[Outcome], scores: Sequence[Score], kinds: Sequence[Score], facts: Mapping[str, Any], samples: int
) -> str:
    """Returns the page as HTML."""
    splits = list(dict.fromkeys(score.split for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    cells = {(s.split, s.task, s.metric): s.interval for s in scores if s.turn is None}
    shown = [
        {"split": split, "task": task, "samples": [_sample(o) for o in _choose(outcomes, split, task, samples)]}
        for split in splits
        for task in tasks
    ]
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            facts=_flat(facts),
            splits=splits,
            tasks=tasks,
            metrics=METRICS,
            cells=cells,
            kinds=sorted({(s.task, s.kind, s.metric) for s in kinds}),
            kind_cells={(s.split, s.task, s.kind, s.metric): s.interval for s in kinds},
            plots=[plot for plot in (plot_tasks(scores), plot_turns(scores)) if plot],
            groups=shown,
            failures=[
                (outcome.number, outcome.example.task, outcome.failure) for outcome in outcomes if outcome.failure
            ],
        )
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("loom_jax.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in facts.items():
        out += _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else [(f"{before}{key}", str(value))]
    return out


def _choose(outcomes: Sequence[Outcome], split: str, task: str, count: int) -> list[Outcome]:
    """Returns outcomes to show: wrong ones make up half of them, if there are so many."""
    own = [outcome for outcome in outcomes if (outcome.split, outcome.example.task) == (split, task)]
    wrong = [outcome for outcome in own if not all(frame["right"] for frame in _frames(outcome))]
    right = [outcome for outcome in own if outcome not in wrong]
    few = min(len(wrong), max(count // 2, count - len(right)))
    return [*right[: count - few], *wrong[:few]]


def _frames(outcome: Outcome) -> list[dict[str, Any]]:
    """Returns each frame beside its truth."""
    truths = render(outcome.example.frames)
    readings = read_pictures(np.stack(outcome.frames)) if outcome.frames else []
    out: list[dict[str, Any]] = []
    for turn, truth in enumerate(truths):
        made = outcome.frames[turn] if turn < len(outcome.frames) else None
        right = made is not None and shows(readings[turn], outcome.example.frames[turn])
        out.append({"truth": _url(truth), "made": None if made is None else _url(made), "right": right})
    return out


def _sample(outcome: Outcome) -> dict[str, Any]:
    """Returns what the page shows of a request."""
    example = outcome.example
    scenes = [scene for _, scene in example.conditions]
    given = list(render(scenes)) if scenes else []
    written = read_plan(outcome.steps)
    steps = [
        {
            "truth": example.plan[k] if k < len(example.plan) else None,
            "written": outcome.steps[k] if k < len(outcome.steps) else None,
            "right": k < min(len(example.steps), len(written)) and written[k] == example.steps[k],
        }
        for k in range(max(len(example.plan), len(outcome.steps)))
    ]
    return {
        "number": outcome.number,
        "instruction": example.instruction,
        "given": [(token, _url(picture)) for (token, _), picture in zip(example.conditions, given, strict=True)],
        "steps": steps,
        "frames": _frames(outcome),
        "failure": outcome.failure,
    }


def _url(picture: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}"


def plot_tasks(scores: Sequence[Score]) -> str:
    """Returns a plot of the main metrics of each task, with their intervals, as a PNG data URL."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    figure, axes = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        own = [s for s in scores if s.task == task and s.turn is None and s.metric in _PLOTTED]
        metrics = [name for name in _PLOTTED if any(s.metric == name for s in own)]
        splits = list(dict.fromkeys(s.split for s in own))
        for number, split in enumerate(splits):
            found = {s.metric: s.interval for s in own if s.split == split}
            for place, name in enumerate(metrics):
                if name in found:
                    i = found[name]
                    x = place + (number - (len(splits) - 1) / 2) * 0.36
                    axis.bar(x, i.mean, 0.32, color=_COLOURS[split], label=split if place == 0 else None)
                    axis.errorbar(x, i.mean, [[i.mean - i.low], [i.high - i.mean]], color="#222", capsize=3)
        axis.set_xticks(range(len(metrics)), metrics, rotation=35, ha="right")
        axis.set_title(task)
    return _finish(figure, axes)


def plot_turns(scores: Sequence[Score]) -> str:
    """Returns a plot of step accuracy by turn, for tasks with several, with its intervals, as a PNG data URL."""
    tasks = list(dict.fromkeys(s.task for s in scores if s.metric == "step" and (s.turn or 0) > 1))
    if not tasks:
        return ""
    figure, axes = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        own = [s for s in scores if s.task == task and s.metric == "step" and s.turn is not None]
        for split in dict.fromkeys(s.split for s in own):
            points = sorted((s.turn or 0, s.interval) for s in own if s.split == split)
            turns = [turn for turn, _ in points]
            colour = _COLOURS[split]
            axis.plot(turns, [i.mean for _, i in points], "o-", color=colour, label=split)
            axis.fill_between(turns, [i.low for _, i in points], [i.high for _, i in points], color=colour, alpha=0.2)
        axis.set_xticks(sorted({s.turn or 0 for s in own}))
        axis.set_xlabel("turn")
        axis.set_title(f"{task}: step accuracy")
    return _finish(figure, axes)


def _figure(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * count, 3.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.set_ylim(0, 1.04)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, list(axes)


def _finish(figure: Any, axes: Sequence[Any]) -> str:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def sample_sheet(outcomes: Sequence[Outcome], scale: int = 2) -> PILImage.Image:
    """Returns a picture of requests, two rows each: what was given and made, and under it what should be."""
    given = [render([scene for _, scene in o.example.conditions]) if o.example.conditions else () for o in outcomes]
    first = max(map(len, given))
    columns = first + max(max(len(o.frames), len(o.example.frames)) for o in outcomes)
    cell, gap = SIDE + 2, SIDE // 2 * bool(first)
    sheet = np.full((2 * len(outcomes) * cell, columns * cell + gap, 3), 255, np.uint8)

    def put(row: int, column: int, picture: np.ndarray) -> None:
        y, x = row * cell, column * cell + gap * (column >= first)
        sheet[y : y + SIDE, x : x + SIDE] = picture

    for number, (outcome, conditions) in enumerate(zip(outcomes, given, strict=True)):
        for column, picture in enumerate(conditions, first - len(conditions)):
            put(2 * number, column, picture)
        for row, pictures in enumerate((outcome.frames, render(outcome.example.frames)), 2 * number):
            for column, picture in enumerate(pictures, first):
                put(row, column, picture)
    return PILImage.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))
