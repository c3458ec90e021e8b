"""What each of Loom's ideas is worth: trains every variant of configs/world_ablation.py, and compares them.

    python -m benchmarks ablation --vae runs/world_autoencoder --runs runs/ablation --out out/ablation

Trains the base, and then from it all variants for as many steps on as many rows. Requests, noise and seeds of the
pictures are the same for all, so differences are taken request by request. Runs that are there already, finished or
not, are gone on with. Writes the scores of each run into --out, and table.md and table.json over all that lie there;
what has its scores is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax import api
from loom_jax.commands.sweep import run_child
from loom_jax.configs.world_ablation import IDEAS
from loom_jax.core import LoomError
from loom_jax.data.world import WorldTask
from loom_jax.document import HistoryPolicy, Method
from loom_jax.evaluate import Measurement, WorldSuite, measure, paired_difference, run_suite

CONFIG = Path(__file__).parents[1] / "configs" / "world_ablation.py"
TASKS: tuple[WorldTask, ...] = ("tutorial", "composition")
LATE = 3
"""The turn from which a frame counts as a late one."""
BATCH = 20
"""Requests that are generated together."""
FIGURES = ("tutorial plan", "tutorial step", "tutorial late step", "tutorial consistency", "composition step")
SETTINGS = dataclasses.replace(api.LOOM_SETTINGS, num_timesteps=16, cfg_text_scale=1.0, cfg_img_scale=1.0)
"""Without guidance: a small model follows what it is given closely enough, and the comparison is of the ideas alone."""

Scores = Mapping[str, Any]
"""Of one run: `figures`, figure -> request -> values; `seconds`, what a frame took; `count` and `settings`."""


def main(argv: list[str]) -> int:
    """Trains, scores and compares."""
    args = _parser().parse_args(argv)
    unknown = sorted(set(args.variant or ()) - set(IDEAS))
    if unknown:
        sys.exit(f"--variant {unknown[0]}: there are {', '.join(IDEAS)}")
    changes = {"set": args.set, "set_base": args.set_base}
    _claim(args.runs, "--runs", changes)
    _claim(args.out, "--out", changes | {"count": args.count})
    for seed in range(1, args.seeds + 1):  # all variants once, before any of them twice
        for variant in args.variant or IDEAS:
            saved = args.out / f"{variant},seed={seed}.json"
            if not saved.exists():
                folder = args.runs / f"{variant},seed={seed}"
                base = _train("base", args.runs / "base", {"vae_from": args.vae}, args)
                model = _train(variant, folder, {"seed": seed, "data.seed": seed, "init_from": base}, args)
                part = saved.with_suffix(".part")
                part.write_text(json.dumps(_score(variant, model, args.count)) + "\n", encoding="utf-8")
                part.replace(saved)
            _write(args.out)
    return 0


def _claim(folder: Path, flag: str, recipe: Mapping[str, Any]) -> None:
    """Makes a folder for what comes of one recipe, or checks that it is for this one."""
    record = folder / "recipe.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            record.write_text(json.dumps(recipe) + "\n", encoding="utf-8")
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{flag} {folder} cannot be used ({error}): give another folder")
    if found != recipe:
        sys.exit(f"{flag} {folder} holds what came of {found}, not of {recipe}: give another folder")


def _at_least_1(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vae", type=Path, required=True, metavar="DIR", help="finished run of configs/world_autoencoder.py")
    add("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help="where the runs are [runs/ablation]")
    add("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="where scores go [out/ablation]")
    add("--seeds", type=_at_least_1, default=2, metavar="N", help="seeds of each variant [2]")
    add("--variant", action="append", metavar="NAME", help="only this one; may be repeated [all]")
    add("--count", type=_at_least_1, default=100, metavar="N", help="requests of each task [100]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe of all runs")
    add("--set-base", action="append", default=[], metavar="KEY=VALUE", help="changes that of the base alone")
    return parser


def _train(variant: str, folder: Path, changes: Mapping[str, Any], args: argparse.Namespace) -> Path:
    """Trains a variant, or goes on with it; returns its weights."""
    model = folder.with_name(f"{folder.name},model")
    if not model.exists():
        settings = [f"{key}={value}" for key, value in changes.items()] + args.set
        settings += args.set_base if variant == "base" else []
        loom = [sys.executable, "-m", "loom_jax.cli"]
        command = [*loom, "train", "--config", f"{CONFIG}:{variant}", "--workdir", str(folder)]
        for words in (
            [*command, *(f"--config.{setting}" for setting in settings)],
            [*loom, "convert", "from-run", str(folder), str(model)],
        ):
            if status := run_child(words):
                raise LoomError(
                    f"{' '.join(words)} ended with status {status}, as it says above; what was trained and scored "
                    "before is there, and this command goes on from it"
                )
    return model


def _score(variant: str, model: Path, count: int) -> Scores:
    generator = api.load(model)
    suite = _suite(variant, count)
    outcomes = run_suite(suite, lambda requests: api.interleave(generator, requests, SETTINGS), batch=BATCH)
    figures: dict[str, dict[int, list[float]]] = {}
    for m in measure(outcomes):
        for name in _figures_of(m, suite.method):
            figures.setdefault(name, {}).setdefault(m.number, []).append(m.value)
    tutorials = [o.seconds for o in outcomes if o.example.task == "tutorial"]
    settings = dataclasses.asdict(SETTINGS)
    return {"figures": figures, "seconds": _frame_cost(tutorials), "count": count, "settings": settings}


def _frame_cost(tutorials: Sequence[Sequence[float]]) -> float | None:
    """What a frame took in the fastest batch, as others compile; None where no frame was made.

    Args:
      tutorials: of each request the seconds of its turns, which it shares with the others of its batch.
    """
    batches = [tutorials[begin : begin + BATCH] for begin in range(0, len(tutorials), BATCH)]
    return min(
        (sum({s for turns in batch for s in turns}) / sum(map(len, batch)) for batch in batches if any(batch)),
        default=None,
    )


def _figures_of(m: Measurement, method: Method) -> list[str]:
    if m.metric == "plan" and not method.planning:
        return []
    late = m.metric == "step" and m.turn is not None and m.turn >= LATE
    names = [f"{m.task} {m.metric}", *([f"{m.task} late step"] if late else [])]
    return [name for name in names if name in FIGURES]


def _suite(variant: str, count: int) -> WorldSuite:
    changes: dict[str, Any] = IDEAS[variant]
    history = changes.get("history")
    return WorldSuite(
        tasks=TASKS,
        splits=("test",),
        count=count,
        history=None if history is None else HistoryPolicy.parse(history),
        method=Method(**changes.get("method", {})),
    )


def _write(out: Path) -> None:
    """Writes the table: means over seeds with their spread, and differences from `whole` with intervals."""
    scored = {name: _read(out, name) for name in IDEAS}
    rows = [_row(name, found, scored["whole"]) for name, found in scored.items() if found]
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    titles = ["variant", "seeds", *FIGURES, "s a frame"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        figures = (_cell(row["figures"][name]) for name in FIGURES)
        lines.append([row["variant"], str(row["seeds"]), *figures, _spread(row["seconds"], "{:.3f}")])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table, flush=True)


def _read(out: Path, variant: str) -> dict[str, Scores]:
    """Returns what was scored, by seed."""
    files = sorted(out.glob(f"{variant},seed=*.json"))
    return {file.stem.rpartition("=")[2]: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _row(variant: str, found: Mapping[str, Scores], whole: Mapping[str, Scores]) -> dict[str, Any]:
    figures = {name: _figure(name, found, {} if variant == "whole" else whole) for name in FIGURES}
    seconds = [scores["seconds"] for scores in found.values() if scores["seconds"] is not None]
    return {"variant": variant, "seeds": len(found), "figures": figures, "seconds": seconds}


def _figure(name: str, found: Mapping[str, Scores], whole: Mapping[str, Scores]) -> dict[str, Any]:
    """Returns the mean of each seed, and the difference from the same seed of `whole`; none of what is not measured."""
    own = {seed: scores["figures"][name] for seed, scores in found.items() if name in scores["figures"]}
    pairs = [(whole[seed]["figures"].get(name, {}), own[seed]) for seed in own if seed in whole]
    before, after = (_pool(side) for side in zip(*pairs, strict=True)) if pairs else ({}, {})
    change = paired_difference(before, after) if before.keys() & after.keys() else None
    return {
        "means": [float(np.mean([v for values in seed.values() for v in values])) for seed in own.values()],
        "difference": None if change is None else dataclasses.asdict(change),
    }


def _pool(seeds: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Returns the values of each request over all seeds: it is the same request, so that they are not independent."""
    out: dict[str, list[float]] = {}
    for values in seeds:
        for number, own in values.items():
            out.setdefault(number, []).extend(own)
    return out


def _spread(values: Sequence[float], form: str) -> str:
    """`71.0 ± 1.5`: the mean over seeds, and half of how far they lie apart; nothing of nothing."""
    if not values:
        return ""
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format((max(values) - min(values)) / 2)}"


def _cell(figure: Mapping[str, Any]) -> str:
    """`71.0 ± 1.5 (-3.0 [-5.1, -0.9])`: per cent with the seeds' spread, and the difference in points."""
    text, change = _spread([100 * mean for mean in figure["means"]], "{:.1f}"), figure["difference"]
    if not text or change is None:
        return text
    mean, least, most = (100 * change[name] for name in ("mean", "low", "high"))
    return f"{text} ({mean:+.1f} [{least:+.1f}, {most:+.1f}])"
