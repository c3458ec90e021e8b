"""The flags that describe a job, and the job that they describe: the same for every way to start it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from loom_jax.core import ArgumentParser, InputError
from loom_jax.launch.job import COMMANDS, TPU_SELECTORS, JobDescription

CONFIG = "--config"


def add_job_flags(parser: ArgumentParser) -> None:
    """Adds the flags of what is to run."""
    group = parser.add_argument_group("what runs", "All that stands after -- goes to the command as it is.")
    add = group.add_argument
    add("--command", choices=COMMANDS, default="train", help="of loom [train]")
    add(CONFIG, metavar="FILE", help="recipe; --config.KEY=VALUE changes its keys")
    add("--workdir", metavar="DIR", help="folder of the run, seen by all machines; of other commands, their --out")
    add("--name", help="of the job [loom]")
    add("--env", action="append", metavar="NAME=VALUE", help="variable of every process; may be repeated")
    add("--python", help="interpreter in which loom_jax is installed [python]")
    add("--max-restarts", type=int, metavar="N", help="how often a job that failed is run again [3]")


def add_machine_flags(parser: ArgumentParser) -> None:
    """Adds the flags of where it runs."""
    add = parser.add_argument_group("where it runs").add_argument
    add("--nodes", type=int, metavar="N", help="machines; of TPU slices, those of one slice [1]")
    add("--tasks-per-node", type=int, metavar="N", help="processes on each [1]")
    add("--accelerator", choices=("cpu", "gpu", "tpu"), help="[gpu]")
    add("--devices-per-node", type=int, metavar="N", help="GPUs or TPU chips of each; CPU devices of each process")
    add("--tpu", choices=tuple(TPU_SELECTORS), help="generation")
    add("--topology", metavar="AxBxC", help="of a TPU slice")
    add("--slices", type=int, metavar="N", help="TPU slices [1]")
    add("--cpus-per-task", type=int, metavar="N")
    add("--memory", metavar="SIZE", help="of each node, such as 64G; on Kubernetes 64Gi")
    add("--time-limit", metavar="HH:MM:SS", help="[24:00:00]")
    add("--grace-seconds", type=int, metavar="S", help="time to save before the limit or after a notice [180]")
    add("--no-requeue", dest="requeue", action="store_false", default=None, help="do not run a preempted job again")
    add("--image", help="container image")
    for name in ("partition", "account", "cluster", "project", "zone"):
        add(f"--{name}")
    add("--port", type=int, help="of the coordinator [8476]")


def read_job(parser: ArgumentParser, argv: Sequence[str], **defaults: Any) -> tuple[JobDescription, argparse.Namespace]:
    """Returns the job that arguments describe, and all that was parsed.

    Args:
      defaults: fields of the job that this way to start it sets otherwise.

    Raises:
      ConfigError: the description contradicts itself.
      InputError: bad usage.
    """
    own, after = _split(argv)
    overrides = tuple(a.removeprefix(f"{CONFIG}.") for a in own if a.startswith(f"{CONFIG}."))
    args = parser.parse_args([a for a in own if not a.startswith(f"{CONFIG}.")])
    known = {field.name for field in dataclasses.fields(JobDescription)}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    given |= {"overrides": overrides, "arguments": tuple(after), "env": _variables(args.env or [])}
    return JobDescription(**{**defaults, **given}), args


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and after the first `--`."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _variables(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--env {pair!r}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)
