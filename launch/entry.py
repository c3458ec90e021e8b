"""What every process of a job runs: `python -m loom_jax.launch.entry [--dry-run] COMMAND ...`, a command of `loom`.

It finds its place among the processes from the scheduler's variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from loom_jax import cli
from loom_jax.core import STOPPED, ConfigError, InputError, run_command
from loom_jax.launch.job import COMMANDS, is_shared

USAGE = f"""usage: python -m loom_jax.launch.entry [--dry-run] COMMAND ...

The processes of a job: COMMAND is one of {", ".join(COMMANDS)}, with its own arguments.
Its exit status is that of the command; {STOPPED}: a training was asked to stop, and has saved.
--dry-run says where this process stands in its job, and runs nothing.

example:
  srun python -m loom_jax.launch.entry train --config configs/tiny.py --workdir runs/tiny"""


def main(argv: list[str]) -> int:
    """Runs the command of one process, and returns its exit status.

    Raises:
      InputError: no such command, or one that is a single process is started as several.
      ConfigError: the environment names only part of a place in a job.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    dry_run, (command, *rest) = argv[0] == "--dry-run", argv[argv[0] == "--dry-run" :] or [""]
    if command not in COMMANDS:
        raise InputError(f"command {command!r} is not one of {', '.join(COMMANDS)}")
    where = describe(command, rest)
    if dry_run:
        print(f"{where}: {' '.join(['loom', command, *rest])}")
        return 0
    return cli.main([command, *rest])


def describe(command: str, arguments: Sequence[str]) -> str:
    """Returns where this process stands in its job.

    Raises:
      ConfigError: a command of one process is started as several, or the place is known in part.
    """
    from loom_jax.parallel import find_place

    place = find_place(os.environ, _value(arguments, "--coordinator"))
    if place is None:
        return "alone"
    if not is_shared(command, arguments):
        raise ConfigError(
            f"`loom {command}` is one process on the devices of one machine, but {place.found_by} says that there are "
            f"{place.count or 'several'}: give one node and one task (`loom convert to-orbax` may be several)"
        )
    if place.found_by == "tpu":
        return "one of a TPU pod"
    return f"process {place.number} of {place.count}, coordinator {place.coordinator}, found by {place.found_by}"


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag among arguments, written with a space or with =."""
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
    return None


if __name__ == "__main__":
    sys.exit(run_command("loom_jax.launch.entry", main, sys.argv[1:]))
