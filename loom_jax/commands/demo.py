"""`loom demo`: held-out requests of the drawn world to the weights that come along, which then are trained on."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loom_jax.core import ArgumentParser, InputError

if TYPE_CHECKING:
    from loom_jax.data.world import WorldTask
    from loom_jax.evaluate import Outcome

NAME = "loom demo"
EPILOG = """examples:
  loom demo --out out/demo
  loom demo --checkpoint my_world --out out/mine

Into the folder of an earlier demonstration everything is made anew, also what it had trained. With the same weights the
same pictures come out."""

CHOSEN: tuple[tuple[WorldTask, int], ...] = (("tutorial", 7), ("image_tutorial", 4), ("composition", 0), ("style", 10))
"""Task of the world, and the number of a held-out request. Chosen by what is asked, before there were weights:
tutorials of four frames, one that changes a thing, pictures with the tokens of their roles, a style that is seen."""
SAMPLING = ("--steps", "16", "--cfg-text-scale", "2", "--cfg-img-scale", "1", "--max-new-tokens", "128")
"""How pictures are drawn. Pictures of 64 x 64 pixels need fewer points than the 50 of large ones. Text guidance is half
of theirs: colours here are to be right, not strong. Without picture guidance one branch less is run."""
TRAINING = ("--config.total_steps=20", "--config.data.rows=1", "--config.mesh.preset=single")
"""What is changed of the recipe that trains on: batches of one row, since all of it is to take two minutes at most
on two cores, and those are too small to be cut for many devices."""

REQUESTS = "demo.jsonl"
"""Also tells the folder of an earlier demonstration, whose results may be removed."""
GIVEN, GENERATED, TRAINED = "given", "generated", "training"
"""Folders of the pictures that are given, of what is generated, and of the run that trains on."""


def main(argv: list[str]) -> int:
    """Runs the demonstration and prints what came of it; returns STOPPED where training was asked to stop.

    Raises:
      InputError: bad usage, or weights that are not there or do not fit the recipe.
      LoomError: something cannot be written.
    """
    parser = ArgumentParser(
        prog=NAME,
        description="Draw two tutorials, a composition and a style transfer with the weights that come along, trained\n"
        "on a drawn world; read the pictures back and say which are right; and train on for 20 steps.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where results go [out/demo]")
    add("--checkpoint", type=Path, metavar="DIR", help="other weights of configs/world_tiny.py, as a converted folder")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    weights = _weights(args.checkpoint)
    make_room(args.out)
    outcomes = draw_chosen()
    _write_requests(args.out, outcomes)
    _generate(args.out, weights)
    for line in read_back(args.out / GENERATED, outcomes):
        print(line)
    print(f"look at {args.out / GENERATED / 'gallery.html'}\n", flush=True)
    if status := _train(args.out / TRAINED, weights):
        return status
    print(_read_log(args.out / TRAINED / "metrics.jsonl"))
    print(f"done in {time.perf_counter() - started:.0f} s")
    return 0


def _weights(given: Path | None) -> Path:
    """Returns the folder of the weights, before anything is written.

    Raises:
      CheckpointError: there are none.
    """
    from loom_jax.checkpoint import read_folder, shipped_folder

    weights = shipped_folder() if given is None else given
    read_folder(weights)
    return weights


def make_room(out: Path) -> None:
    """Makes the folder of results, without those of an earlier demonstration.

    Raises:
      InputError: it holds other things under their names, or cannot be written to.
    """
    from loom_jax.commands.generate import make_folder

    make_folder(out)
    mark = out / REQUESTS
    for folder in (out / GIVEN, out / GENERATED, out / TRAINED):
        if not folder.exists():
            continue
        if not mark.is_file():
            raise InputError(f"{folder} is there and, without a {REQUESTS} beside it, of no demo: choose another --out")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be removed ({error.strerror}): choose another --out") from error
    mark.touch()  # now: also what is stopped before it wrote its requests makes room for the next


def draw_chosen() -> list[Outcome]:
    """Returns the chosen examples, numbered as their requests are, of which nothing is made yet."""
    from loom_jax.data.world import draw_example
    from loom_jax.evaluate import Outcome, WorldSuite

    seed = WorldSuite().seed  # so that they are among the requests of `loom evaluate`
    return [
        Outcome(number, "test", draw_example(task, "test", seed, index)) for number, (task, index) in enumerate(CHOSEN)
    ]


def _write_requests(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the requests, and the pictures that are given with them, as `loom generate --requests` takes them."""
    from loom_jax.evaluate import WorldSuite

    lines = []
    (out / GIVEN).mkdir()
    for outcome in outcomes:
        request = WorldSuite().request(outcome)
        names = [f"{GIVEN}/{outcome.number}_{i}.png" for i in range(len(request.images))]
        for name, picture in zip(names, request.images, strict=True):
            picture.save(out / name)
        fields = {"task": request.task, "prompt": request.instruction, "image": names, "entity": request.entities}
        lines.append(json.dumps({**fields, "size": request.size, "seed": request.seed}) + "\n")
    (out / REQUESTS).write_text("".join(lines), encoding="utf-8")


def _generate(out: Path, weights: Path) -> None:
    """Makes all requests in one call. Some may fail, which is told, and is no failure of the demonstration."""
    from loom_jax.commands import generate

    arguments = ["--checkpoint", str(weights), "--requests", str(out / REQUESTS), *SAMPLING]
    _run("generate", generate.main, [*arguments, "--out", str(out / GENERATED)])


def read_back(folder: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Returns a line for each request: how many of its frames the world's reader finds to be right."""
    import dataclasses

    import numpy as np

    from loom_jax.document import to_rgb
    from loom_jax.evaluate import measure, read_sequences, values_of

    finished = read_sequences(folder)
    made = [
        dataclasses.replace(
            outcome, frames=tuple(np.asarray(to_rgb(picture)) for _, picture in finished[outcome.number].turns)
        )
        for outcome in outcomes
        if outcome.number in finished
    ]
    right = values_of(measure(made), "step")
    lines = []
    for outcome in outcomes:
        frames = len(outcome.example.frames)
        found = f"{sum(right.get(outcome.number, [])):.0f} of {frames} frames show just what they should"
        failed = "" if outcome.number in finished else ": it failed"
        lines.append(f"{outcome.example.task:15} {found}{failed}")
    return lines


def _train(workdir: Path, weights: Path) -> int:
    """Trains on from the weights; returns the status of the command."""
    from loom_jax import configs
    from loom_jax.commands import train

    recipe = Path(configs.__file__).with_name("world_tiny.py")
    arguments = ["--config", f"{recipe}:on", f"--config.init_from={weights}", *TRAINING, "--workdir", str(workdir)]
    return _run("train", train.main, arguments)


def _read_log(path: Path) -> str:
    """Returns in one line how training went; its speed is that of the last few steps, after compilation."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    losses = " to ".join(f"{line['loss']:.3f} at step {line['step']}" for line in (first, last))
    return f"loss from {losses}, {last['tokens_per_second']:,.0f} tokens/s"


def _run(name: str, command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs another command of `loom`, after it showed what one would type for it; returns its status."""
    print(f"$ loom {name} {shlex.join(arguments)}", flush=True)
    return command(arguments)
