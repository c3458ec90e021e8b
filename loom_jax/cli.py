"""The one command `loom`. It knows the names of its subcommands, and imports the one that is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from loom_jax import __version__
from loom_jax.core import InputError, run_command


class Command(NamedTuple):
    """One subcommand: what it does, and the `module:function` that takes its arguments and returns the exit status."""

    summary: str
    target: str


COMMANDS = {
    "demo": Command("draw tutorials with the weights that come along, and train on", "loom_jax.commands.demo:main"),
    "generate": Command("generate pictures or text with a checkpoint", "loom_jax.commands.generate:main"),
    "data": Command("build data sets, look at their rows, store latents with them", "loom_jax.commands.data:main"),
    "train": Command("train a model by a recipe, and go on where it stopped", "loom_jax.commands.train:main"),
    "evaluate": Command("score a model on held-out requests, with a report", "loom_jax.commands.evaluate:main"),
    "runs": Command("list the runs in a folder, and how they stand; compare two", "loom_jax.commands.runs:main"),
    "sweep": Command("train a recipe with lists of overrides, into one table", "loom_jax.commands.sweep:main"),
    "plan": Command(
        "say whether a job fits chips that are not there, and how fast it is", "loom_jax.commands.plan:main"
    ),
    "convert": Command("turn a PyTorch release folder into an Orbax folder, or back", "loom_jax.converters.bagel:main"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `loom`: returns 0, 1 where the job failed, or 2 on bad usage or bad input (one line on stderr)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"loom_jax {__version__}")
        return 0
    name, *rest = arguments
    return run_command(f"loom {name}" if name in COMMANDS else "loom", lambda argv: find(name)(argv), rest)


def usage() -> str:
    """Returns the help text: every subcommand with its line."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: loom COMMAND [ARGUMENTS]\n\n"
        "Interleaved text-image generation with one diffusion transformer.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  -h, --help  show this\n  --version   show the version\n\n"
        "example:\n  loom demo --out out/demo\n\n"
        "`loom COMMAND --help` shows what a command takes. LOOM_DEBUG=1 shows the traceback of every error."
    )


def find(name: str) -> Callable[[list[str]], int]:
    """Imports the function behind a subcommand.

    Raises:
      InputError: there is no such subcommand; the message names the nearest.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {name!r}: {hint} (see loom --help)")
    module, function = COMMANDS[name].target.split(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
