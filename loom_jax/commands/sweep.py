"""`loom sweep`: one recipe, lists of overrides, one run for each combination, one table."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loom_jax.commands.runs import print_table, read_state, row
from loom_jax.core import STOPPED, ArgumentParser, InputError, LoomError

NAME = "loom sweep"
CONFIG = "--config"
POLL_SECONDS = 0.2
EPILOG = """examples:
  loom sweep --config configs/tiny.py --workdir runs/rates --set optimizer.learning_rate=1e-4,3e-4 --set seed=1,2
  loom sweep --config configs/tiny.py --workdir runs/two --set seed=1,2 --config.mesh.preset=hsdp \\
      --config.data.shards=2 --launcher "python -m loom_jax.launch.local --processes 2"
  loom sweep --workdir runs/rates --table

A run that is finished is not run again: the same command goes on where it stopped. Values with commas of their own are
written in brackets or quotes: --set "data.canvases=[1,2],[3,4]". SIGTERM or Ctrl-C lets the run at
hand save, and stops."""


def main(argv: list[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage.
      LoomError: at least one of the runs failed, and the table is printed before; or one was asked to stop.
    """
    parser = ArgumentParser(prog=NAME, description="Train one recipe with lists of overrides.", epilog=EPILOG)
    add = parser.add_argument
    add(CONFIG, metavar="FILE", help="recipe; --config.KEY=VALUE changes a key in all runs")
    add("--workdir", type=Path, required=True, metavar="DIR", help="folder in which each run gets its own")
    add("--set", action="append", default=[], metavar="KEY=A,B", help="values of a key; all combinations are run")
    add("--launcher", metavar="COMMAND", help="what starts a run, given --config, --workdir and --config.KEY=VALUE")
    add("--dry-run", action="store_true", help="print the commands, and run nothing")
    add("--table", action="store_true", help="print the table of the runs that are there, and run nothing")
    args = parser.parse_args([a for a in argv if not a.startswith(f"{CONFIG}.")])
    if args.table:
        print_table(read_table(args.workdir))
        return 0
    if args.config is None or not args.set:
        raise InputError(f"a sweep needs --config FILE and at least one --set KEY=A,B (see {NAME} --help)")
    shared = [a for a in argv if a.startswith(f"{CONFIG}.")]
    launcher = shlex.split(args.launcher) if args.launcher else [sys.executable, "-m", "loom_jax.cli", "train"]
    runs = combinations([parse_values(text) for text in args.set])
    failed = []
    for settings in runs:
        folder = args.workdir / run_name(settings)
        command = [*launcher, CONFIG, args.config, "--workdir", str(folder), *shared]
        command += [f"{CONFIG}.{key}={value}" for key, value in settings.items()]
        if args.dry_run:
            print(shlex.join(command))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
        if read_state(folder, args.workdir).state != "finished" and not _run(command, folder.name):
            failed.append(folder.name)
    if not args.dry_run:
        print_table(read_table(args.workdir))
    if failed:
        raise LoomError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return 0


def run_child(command: Sequence[str]) -> int:
    """Runs a command to its end and returns its exit status; asked to stop, asks it once and lets it save first.

    Raises:
      LoomError: this process was asked to stop.
      FileNotFoundError: there is no such command.
    """
    from loom_jax.parallel import PreemptionNotice  # jax, which --help does not need

    with PreemptionNotice() as notice:
        # In a session of its own a Ctrl-C does not reach it besides.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            while process.poll() is None and not notice.received:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=POLL_SECONDS)
            if notice.received:
                process.terminate()
                process.wait()
        finally:
            process.terminate()  # where a later Ctrl-C ends both at once
    if notice.received:
        raise LoomError("asked to stop; the same command goes on from the last checkpoint")
    return process.returncode


def _run(command: Sequence[str], name: str) -> bool:
    print(f"run {name}", flush=True)
    try:
        status = run_child(command)
    except FileNotFoundError as error:
        raise InputError(f"--launcher: there is no command {command[0]!r}") from error
    if status == STOPPED:
        raise LoomError(f"run {name} was asked to stop, and has saved; the same command goes on")
    return status == 0


def parse_values(text: str) -> tuple[str, list[str]]:
    """Returns key and values of `KEY=A,B`; commas in brackets and quotes belong to a value.

    Raises:
      InputError: there is no key or no value.
    """
    key, equals, rest = text.partition("=")
    values = re.findall(r"""(?:[^,\[\](){}'"]|'[^']*'|"[^"]*"|\[[^\]]*\]|\([^)]*\)|\{[^}]*\})+""", rest)
    if not key or not equals or not values:
        raise InputError(f"--set {text!r}: expected KEY=A,B, such as optimizer.learning_rate=1e-4,3e-4")
    return key, values


def combinations(choices: Sequence[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """Returns every combination of values, key -> value; the last key changes fastest.

    Raises:
      InputError: a key is given twice, or two combinations would have one folder.
    """
    keys = [key for key, _ in choices]
    runs = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in choices))]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise InputError(f"--set {twice}: given twice; write all its values after one --set")
    names = [run_name(run) for run in runs]
    same = next((name for name in names if names.count(name) > 1), None)
    if same is not None:
        raise InputError(f"two runs would have the folder {same!r}: give each value once")
    return runs


def run_name(settings: Mapping[str, str]) -> str:
    """Returns the folder of a run: `learning_rate=1e-4,seed=2`."""
    last = [key.rpartition(".")[2] for key in settings]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(settings, last, strict=True)}
    safe = {key: re.sub(r"[^-+.\w]+", "_", value) for key, value in settings.items()}
    return ",".join(f"{short[key]}={value}" for key, value in safe.items())


def read_table(workdir: Path) -> list[dict[str, str]]:
    """Returns a row for each run of a sweep: its settings, and how it stands.

    Raises:
      InputError: there is no sweep.
    """
    rows = []
    for record in sorted(workdir.glob("*/sweep.json")):
        settings = json.loads(record.read_text(encoding="utf-8"))
        state = row(read_state(record.parent, workdir))
        rows.append((settings, {name: value for name, value in state.items() if name != "run"}))
    if not rows:
        raise InputError(f"{workdir} holds no runs of a sweep")
    settings_first = dict.fromkeys(key for settings, _ in rows for key in settings)
    return [{key: settings.get(key, "") for key in settings_first} | state for settings, state in rows]
