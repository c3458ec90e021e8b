"""`loom runs`: which runs lie in a folder, how far they are, and in what two of them differ."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loom_jax.core import ArgumentParser, CheckpointError, InputError, read_heartbeats, silent_processes

NAME = "loom runs"
RECORDS = {"run.json": "train", "autoencoder.json": "config"}
"""File that makes a folder a run, of a model or of an autoencoder -> its key for the configuration."""
SILENT_SECONDS = 300.0
"""A running job that has not begun a step for so long is said to hang."""
EPILOG = """examples:
  loom runs runs
  loom runs runs --json
  loom runs runs --plot curves.png
  loom runs diff runs/first runs/second"""


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run stands.

    Attributes:
      name: of its folder, seen from the folder that was searched.
      state: running, finished, stopped, failed, hangs, or unknown where it left no heartbeat.
      step: the last one of the log or of a heartbeat.
      total_steps: that it is to have.
      saved: step of the newest checkpoint.
      loss: the last one of the log.
      note: what else there is to know, such as who holds it up.
    """

    name: str
    state: str
    step: int
    total_steps: int | None
    saved: int | None
    loss: float | None
    note: str = ""


def main(argv: list[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage, or no run where one is asked for.
    """
    if argv[:1] == ["diff"]:
        return _diff(argv[1:])
    parser = ArgumentParser(prog=NAME, description="List the runs in a folder; `loom runs diff A B`.", epilog=EPILOG)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder with runs at any depth")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw their losses into a .png, .svg or .pdf as well")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise InputError(f"{args.folder} is no folder: give one with runs in it")
    found = list(find_runs(args.folder))
    runs = [read_state(path, args.folder) for path in found]
    if args.json:
        for run in runs:
            print(json.dumps(dataclasses.asdict(run)))
    elif not runs:
        print(f"no runs in {args.folder}")
    else:
        print_table([row(run) for run in runs])
    if args.plot:
        from loom_jax.commands.runs_plot import plot_runs

        plot_runs({run.name: path for run, path in zip(runs, found, strict=True)}, args.plot)
        if not args.json:
            print(args.plot)
    return 0


def _diff(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog=f"{NAME} diff", description="Show in which keys two runs differ.", epilog=EPILOG)
    parser.add_argument("runs", type=Path, nargs=2, metavar="DIR")
    args = parser.parse_args(argv)
    left, right = (flat(read_config(path)) for path in args.runs)
    differences = config_difference(left, right)
    if not differences:
        print("the configurations are the same")
    else:
        print_table([{"key": key, str(args.runs[0]): a, str(args.runs[1]): b} for key, (a, b) in differences.items()])
    return 0


def find_runs(folder: Path) -> Iterator[Path]:
    """Yields the run folders in a folder, or itself, by name; runs do not lie in runs."""
    if any((folder / record).is_file() for record in RECORDS):
        yield folder
        return
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield from find_runs(path)


def read_state(folder: Path, seen_from: Path) -> Run:
    """Returns how a run stands; reads no more than its records and its log."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    last = last_line(folder)
    beats = read_heartbeats(folder)
    late = silent_processes(beats, SILENT_SECONDS, time.time())
    state, note = "unknown", ""
    if beats:
        states = [beat.state for beat in beats]
        state = next((s for s in ("failed", "running", "stopped") if s in states), "finished")
    if late:
        state = "hangs"
        note = f"process {late[0].process} on {late[0].host} is at step {late[0].step}"
    name = str(folder.relative_to(seen_from)) if folder != seen_from else folder.name
    try:
        total = read_config(folder)["total_steps"]
    except CheckpointError as error:
        total, note = None, str(error)
    step = max([last.get("step", 0), *(beat.step for beat in beats)])
    if not beats and step == total:  # that of an autoencoder leaves none
        state = "finished"
    return Run(name, state, step, total, max(steps, default=None), last.get("loss"), note)


def last_line(folder: Path) -> dict[str, Any]:
    """Returns the last line of a run's log; empty where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for text in reversed(lines):
        try:
            return json.loads(text)
        except ValueError:
            continue  # cut off, as the run is writing it
    return {}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration that a run was made with.

    Raises:
      CheckpointError: it is no run, or its record cannot be read.
    """
    found = [(folder / name, key) for name, key in RECORDS.items() if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} is not a training run: it holds no run.json; give the --workdir of a run")
    file, key = found[0]
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted keys -> values of nested mappings and lists of mappings, as overrides spell them."""
    if isinstance(config, Mapping):
        pairs = list(config.items())
    elif isinstance(config, list) and any(isinstance(item, Mapping) for item in config):
        pairs = list(enumerate(config))
    else:
        return {prefix.removesuffix("."): config}
    return {key: value for name, inner in pairs for key, value in flat(inner, f"{prefix}{name}.").items()}


def config_difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns key -> its values in two configurations, where these differ; `-` where a key is absent."""

    def shown(side: Mapping[str, Any], key: str) -> str:
        return repr(side[key]) if key in side else "-"

    pairs = {key: (shown(left, key), shown(right, key)) for key in (*left, *right)}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def row(run: Run) -> dict[str, str]:
    """The line of a run in the table."""
    total = "?" if run.total_steps is None else str(run.total_steps)
    return {
        "run": run.name,
        "state": run.state,
        "step": f"{run.step}/{total}",
        "saved": "-" if run.saved is None else str(run.saved),
        "loss": "-" if run.loss is None else f"{run.loss:.4f}",
        "note": run.note,
    }


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows with the same keys as columns; a column without any value is left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for line in ({name: name for name in columns}, *rows):
        print("  ".join(f"{line[name]:{widths[name]}}" for name in columns).rstrip())
