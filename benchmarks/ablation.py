"""What each of Loom's ideas is worth: trains every variant of configs/world_ablation.py, and compares them.

    python -m benchmarks ablation --vae runs/world_autoencoder --runs runs/ablation --out out/ablation

Runs that are there already, finished or not, are gone on with; what was scored is not scored again. Writes table.md and
table.json into --out. All variants are trained for as many steps on as many rows; requests, noise and seeds of the
pictures are the same for all, so differences are taken request by request.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax import api
from loom_jax.configs.world_ablation import VARIANTS
from loom_jax.data.world import WorldTask
from loom_jax.document import HistoryPolicy, Method
from loom_jax.evaluate import Measurement, WorldSuite, measure, paired_difference, run_suite, values_of

CONFIG = Path(__file__).parents[1] / "configs" / "world_ablation.py"
TASKS: tuple[WorldTask, ...] = ("tutorial", "composition")
FIGURES = (("tutorial", "plan"), ("tutorial", "step"), ("tutorial", "consistency"), ("composition", "step"))
SETTINGS = dataclasses.replace(api.LOOM_SETTINGS, num_timesteps=16, cfg_text_scale=1.0, cfg_img_scale=1.0)
"""Without guidance: a small model follows what it is given closely enough, and the comparison is of the ideas alone."""

Scores = Mapping[str, Any]


def main(argv: list[str]) -> int:
    """Trains, scores and compares."""
    args = _parser().parse_args(argv)
    unknown = sorted(set(args.variant or ()) - set(VARIANTS))
    if unknown:
        sys.exit(f"--variant {unknown[0]}: there are {', '.join(VARIANTS)}")
    scored: dict[str, list[Scores]] = {}
    for seed in range(1, args.seeds + 1):  # all variants once, before any of them twice
        for variant in args.variant or VARIANTS:
            folder = args.runs / f"{variant},seed={seed}"
            _train(variant, seed, folder, args)
            scored.setdefault(variant, []).append(_score(variant, folder, args))
            _write(args.out, scored)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vae", type=Path, required=True, metavar="DIR", help="finished run of configs/world_autoencoder.py")
    add("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help="where the runs are [runs/ablation]")
    add("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="where the table goes [out/ablation]")
    add("--seeds", type=int, default=2, metavar="N", help="seeds of each variant [2]")
    add("--variant", action="append", metavar="NAME", help="only this one; may be repeated [all]")
    add("--count", type=int, default=100, metavar="N", help="requests of each task and split [100]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe of all runs")
    return parser


def _train(variant: str, seed: int, folder: Path, args: argparse.Namespace) -> None:
    changes = {"seed": seed, "data.seed": seed, "vae_from": args.vae}
    settings = [f"--config.{key}={value}" for key, value in changes.items()] + [f"--config.{s}" for s in args.set]
    command = [sys.executable, "-m", "loom_jax.cli", "train", "--config", f"{CONFIG}:{variant}"]
    subprocess.run([*command, "--workdir", str(folder), *settings], check=True)


def _score(variant: str, folder: Path, args: argparse.Namespace) -> Scores:
    """Returns the measurements of a finished run and the seconds that a frame took."""
    saved = folder / f"scores_{args.count}.json"
    if not saved.exists():
        model = folder.with_name(f"{folder.name},model")
        if not model.exists():
            command = [sys.executable, "-m", "loom_jax.cli", "convert", "from-run", str(folder), str(model)]
            subprocess.run(command, check=True)
        generator = api.load(model)
        suite = _suite(variant, args.count)
        outcomes = run_suite(suite, lambda requests: api.interleave(generator, requests, SETTINGS), batch=20)
        # The first batch of a task compiles; later ones tell what a frame costs.
        seconds = [s for o in outcomes if o.example.task == "tutorial" for s in o.seconds][-20:]
        found = {
            "measurements": [dataclasses.asdict(m) for m in measure(outcomes)],
            "seconds": _mean(seconds),
        }
        saved.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(saved.read_text(encoding="utf-8"))


def _suite(variant: str, count: int) -> WorldSuite:
    changes: dict[str, Any] = VARIANTS[variant]
    history = changes.get("history")
    return WorldSuite(
        tasks=TASKS,
        splits=("test",),
        count=count,
        history=None if history is None else HistoryPolicy.parse(history),
        method=Method(**changes.get("method", {})),
    )


def _write(out: Path, scored: Mapping[str, Sequence[Scores]]) -> None:
    """Writes the table: means over seeds with their spread, and differences from `whole` with intervals."""
    rows = [_row(variant, found, scored.get("whole", ())) for variant, found in scored.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    titles = ["variant", "seeds", *(f"{task} {metric}" for task, metric in FIGURES), "s a frame"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [_cell(row["figures"][f"{task} {metric}"]) for task, metric in FIGURES]
        lines.append(
            [row["variant"], str(row["seeds"]), *cells, "" if row["seconds"] is None else f"{row['seconds']:.3f}"]
        )
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table, flush=True)


def _row(variant: str, found: Sequence[Scores], whole: Sequence[Scores]) -> dict[str, Any]:
    figures = {}
    for task, metric in FIGURES:
        if metric == "plan" and not Method(**VARIANTS[variant].get("method", {})).planning:
            figures[f"{task} {metric}"] = {"means": [], "difference": None}
            continue
        own = [_values(scores, task, metric) for scores in found]
        means = [float(np.mean([v for values in seed.values() for v in values])) for seed in own if seed]
        pairs = [(_values(before, task, metric), seed) for before, seed in zip(whole, own, strict=False)]
        # A request with another seed of training is another one: seeds widen the interval.
        first = {(k, n): v for n, (before, _) in enumerate(pairs) for k, v in before.items()}
        second = {(k, n): v for n, (_, after) in enumerate(pairs) for k, v in after.items()}
        change = paired_difference(first, second) if variant != "whole" and first and second else None
        figures[f"{task} {metric}"] = {
            "means": means,
            "difference": None if change is None else dataclasses.asdict(change),
        }
    seconds = _mean([scores["seconds"] for scores in found if scores["seconds"] is not None])
    return {"variant": variant, "seeds": len(found), "figures": figures, "seconds": seconds}


def _mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing, as where a model wrote no plan."""
    return float(np.mean(values)) if values else None


def _values(scores: Scores, task: str, metric: str) -> dict[int, list[float]]:
    return values_of([Measurement(**m) for m in scores["measurements"]], metric, task=task)


def _cell(figure: Mapping[str, Any]) -> str:
    """`71.0 % ± 1.5 (-3.0 [-5.1, -0.9])`: mean and half the seeds' spread, and the difference in points."""
    if not figure["means"]:
        return ""
    low, high = min(figure["means"]), max(figure["means"])
    text = f"{np.mean(figure['means']):.1%} ± {50 * (high - low):.1f}"
    change = figure["difference"]
    if change is None:
        return text
    mean, least, most = (100 * change[name] for name in ("mean", "low", "high"))
    return f"{text} ({mean:+.1f} [{least:+.1f}, {most:+.1f}])"
