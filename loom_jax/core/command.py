"""What every command line of this framework shares: one clear line instead of a traceback, and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from loom_jax.core.errors import InputError, LoomError

BAD_INPUT = 2
FAILED = 1
STOPPED = 75
"""Of a training that has saved and ended because of a signal: the same command goes on."""
INTERRUPTED = 130


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that keeps line breaks in its texts, takes no abbreviated flags, and raises its complaints.

    Give a working example as `epilog`.

    Raises:
      InputError: on bad usage, where argparse by itself prints the whole usage and exits.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Raises InputError with what argparse found wrong and where the help is."""
        raise InputError(f"{message} (see {self.prog} --help)")


def run_command(name: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs `main(argv)` and returns the exit status: what main returned, 2 on bad input, 1 where the job failed.

    `name` is the command as it was typed; it begins the one line that stderr gets. With LOOM_DEBUG=1 in the environment
    every error keeps its traceback; one that this framework does not know always does.
    """
    try:
        return main(argv)
    except LoomError as error:
        if os.environ.get("LOOM_DEBUG") == "1":
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
