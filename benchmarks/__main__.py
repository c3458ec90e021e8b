"""Runs benchmarks, from the root of a checkout.

    python -m benchmarks                              # what there is
    python -m benchmarks attention --out attention.json
    python -m benchmarks all --smoke --out out/bench  # each in a process of its own, one JSON file each

Every benchmark prints a table and takes --smoke, which shows in a minute or so that it runs, --out, and --help.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loom_jax.core import run_command

BENCHMARKS = {
    "attention": "each attention backend by length, against the dense one",
    "sampling": "guided pictures in one batched loop, against one branch and one request at a time",
    "training": "a step against the dense mask and both experts on every token; the input pipeline against the step",
    "remat": "seconds and memory of a step under each remat policy",
    "cpu_step": "a training step and a picture on a CPU, beside the floor and the PyTorch original",
    "compilation": "seconds to compile the step, by the number of layers",
    "packing": "how full packed rows are",
    "interleave": "the cost of a frame by its turn and the history that it sees",
    "precision": "bfloat16, int8 weights and TaylorSeer against float32",
    "conversion": "memory and speed of checkpoint conversion, against cp",
    "restore": "peak memory of restoring shards in two processes",
    "accelerator": "a slice of the 7 B model on one GPU or TPU: MFU, pictures, text",
    "ablation": "what each idea of Loom is worth on the tutorial world: trains for hours",
}
NOT_IN_ALL = ("accelerator", "ablation")


def main(argv: list[str]) -> int:
    """Runs what is asked for; returns its exit status, for `all` 1 if one failed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        table = Table("benchmark", "what it measures", box=None)
        for name, summary in BENCHMARKS.items():
            table.add_row(name, summary)
        Console(width=120).print(table)
        return 0
    name, *rest = argv
    if name == "all":
        return _run_all(rest)
    if name not in BENCHMARKS:
        print(f"no benchmark {name!r}: choose all or one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(rest)


def _run_all(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks all", description=f"All but {' and '.join(NOT_IN_ALL)}."
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that all run")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("out/benchmarks"), help="[out/benchmarks]")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in (name for name in BENCHMARKS if name not in NOT_IN_ALL):
        print(f"\n{name}: {BENCHMARKS[name]}", flush=True)
        command = [sys.executable, "-m", "benchmarks", name, "--out", str(args.out / f"{name}.json")]
        if subprocess.run([*command, *(["--smoke"] if args.smoke else [])]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks", main, sys.argv[1:]))
