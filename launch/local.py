"""`python -m loom_jax.launch.local ...`: a job of several processes on one machine, started again where one dies."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from loom_jax.core import ArgumentParser, run_command
from loom_jax.launch.arguments import add_job_flags, read_job
from loom_jax.launch.processes import LocalJob, Patience

NAME = "loom_jax.launch.local"
EPILOG = """example:
  python -m loom_jax.launch.local --processes 2 --devices 4 --config configs/tiny.py --workdir runs/two \\
      --config.mesh.preset=hsdp --config.data.shards=2

Each process simulates --devices CPU devices; with --accelerator gpu it takes its part of the machine's GPUs instead.
Where a process dies or hangs, the others are ended and all begin again from the last checkpoint. SIGTERM saves and
stops.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage, or a job that cannot be.
      LoomError: the job failed.
    """
    parser = ArgumentParser(prog=f"python -m {NAME}", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--processes", type=int, default=2, metavar="N", help="[2]")
    add("--devices", dest="devices_per_node", type=int, metavar="M", help="CPU devices that each simulates [1]")
    add("--accelerator", choices=("cpu", "gpu"), help="[cpu]")
    add("--hang-seconds", type=float, default=0.0, metavar="S", help="longest time without a step; 0 for ever [0]")
    add("--dry-run", action="store_true", help="print the commands, and run nothing")
    add_job_flags(parser)
    job, args = read_job(parser, argv, accelerator="cpu")
    local = LocalJob(job, args.processes, Patience(hang=args.hang_seconds), say=_print)
    if args.dry_run:
        for variables, words in local.commands():
            print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *words]))
        return 0
    return local.run()


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(NAME, main, sys.argv[1:]))
