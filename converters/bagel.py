"""Conversion of BAGEL checkpoints: `loom convert`, or `python -m loom_jax.converters.bagel`."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.core import ArgumentParser, CheckpointError, run_command
from loom_jax.core.command import BAD_INPUT, FAILED

if TYPE_CHECKING:
    import numpy as np

NAME = "loom convert"
DTYPES = ("bfloat16", "float32")

_EXAMPLES = """example:
  {name} to-orbax BAGEL-7B-MoT bagel_7b
  {name} inspect bagel_7b
  {name} from-orbax bagel_7b BAGEL-again
  {name} from-run runs/loom_7b loom_7b --dtype bfloat16
  {name} from-parts --llm Qwen2.5-7B --vit siglip-so400m --vae ae.safetensors untrained
"""


def to_orbax(
    source: Path,
    destination: Path,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Converts a PyTorch release folder into a folder that this framework loads.

    Nothing appears at `destination` before everything is written. Host memory: some hundred MiB and the largest tensor.
    All processes of a job make the same call: each reads and writes its share of the tensors.

    Args:
      weights: `ema` or `model` (ema.safetensors, model.safetensors or their shards); what is there, `ema` first.
      dtype: `bfloat16` or `float32` casts the transformer's weights; by default every tensor keeps its dtype.
      overwrite: whether an earlier conversion at `destination` may be replaced.
      progress: whether stderr shows a bar.

    Raises:
      CheckpointError: the release is incomplete, corrupt or contradicts itself; or `destination` cannot be used.
      TokenizerError: the tokenizer's files are missing or of an unknown kind.
      ElsewhereError: in a job of several processes, where another one raises one of these.
    """
    from loom_jax.checkpoint import shared_folder
    from loom_jax.converters.release import open_release
    from loom_jax.converters.stream import write_converted
    from loom_jax.parallel import together

    with together():
        _check_places(source, destination)
        release = open_release(source, weights)
        cast = _dtype(dtype)
    total = release.model.nbytes + release.vae.nbytes
    widened = 1 if cast is None else max(cast.itemsize / kept.itemsize for kept in release.model.dtypes.values())
    with shared_folder(destination, overwrite=overwrite) as folder, _bar("to Orbax", total, progress) as advance:
        with together():
            _check_space(folder, int(total * max(1, widened)))
        write_converted(release, folder, cast, advance)


def from_orbax(source: Path, destination: Path, *, overwrite: bool = False, progress: bool = False) -> None:
    """Converts a folder of this framework back into the layout of the PyTorch release.

    Args:
      overwrite: whether a release at `destination` may be replaced.
      progress: whether stderr shows a bar.

    Raises:
      CheckpointError: the folder is incomplete or corrupt; or `destination` cannot be used.
    """
    from loom_jax.checkpoint import new_folder, read_folder
    from loom_jax.converters.stream import stored_bytes, write_release

    _check_places(source, destination)
    converted = read_folder(source)
    total = stored_bytes(converted)
    with (
        new_folder(destination, overwrite=overwrite, mark="ema.safetensors") as folder,
        _bar("to safetensors", total, progress) as advance,
    ):
        _check_space(folder, total)
        write_release(converted, folder, advance)


def from_parts(
    llm: Path,
    vit: Path,
    vae: Path,
    destination: Path,
    *,
    max_latent_size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Makes an untrained Bagel, as a folder that this framework loads, from the models that it is built of.

    Args:
      llm: Qwen2.5 folder; vit: SigLIP folder; vae: ae.safetensors of FLUX; see `converters.parts.open_parts`.
      max_latent_size: side of the table of latent positions, in tokens of 16 pixels.
      seed: of the connectors.
      overwrite: whether an earlier conversion at `destination` may be replaced.
      progress: whether stderr shows a bar.

    Raises:
      CheckpointError: a part is missing, corrupt or of another kind; or `destination` cannot be used.
      TokenizerError: the tokenizer's files are missing or of an unknown kind.
    """
    from loom_jax.checkpoint import new_folder
    from loom_jax.converters.parts import open_parts
    from loom_jax.converters.stream import write_converted

    for source in (llm, vit, vae):
        _check_places(source, destination)
    release = open_parts(llm, vit, vae, max_latent_size=max_latent_size, seed=seed)
    total = release.model.nbytes + release.vae.nbytes
    with new_folder(destination, overwrite=overwrite) as folder, _bar("to Orbax", total, progress) as advance:
        _check_space(folder, total)
        write_converted(release, folder, None, advance)


def from_run(
    source: Path,
    destination: Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    merge_lora: bool = False,
    dtype: str | None = None,
    vae: Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Exports a checkpoint of a training run into a folder that this framework loads; `from-orbax` goes on from there.

    Args:
      step: which checkpoint; the newest by default.
      weights: `ema`, the moving average, or `params`, the trained parameters themselves.
      merge_lora: adds low-rank adapters to the weights; needed where the run has such.
      dtype: `bfloat16` or `float32` casts the transformer's weights; by default they stay as they were trained.
      vae: finished run of an autoencoder to be taken in place of the run's own: one whose decoder was trained on later
        (`keep_encoder`). Latents must mean the same: its encoder must equal that of the run's own to the bit.
      overwrite: whether an earlier conversion at `destination` may be replaced.
      progress: whether stderr shows a bar.

    Raises:
      CheckpointError: the run, its checkpoint or `vae` cannot be used, or `destination` cannot.
    """
    from loom_jax.checkpoint import new_folder
    from loom_jax.converters.from_run import open_run, write_run

    _check_places(source, destination)
    run = open_run(source, step, weights, merge_lora)
    cast = _dtype(dtype)
    with new_folder(destination, overwrite=overwrite) as folder, _bar("from run", run.nbytes, progress) as advance:
        _check_space(folder, run.nbytes)
        write_run(run, folder, cast, vae, advance)


def inspect(source: Path) -> None:
    """Prints components, sizes, dtypes and configuration of a release folder or of a converted one.

    Raises:
      CheckpointError, TokenizerError: the folder is neither, or is broken; see `to_orbax`.
    """
    from loom_jax.converters.report import print_report

    print_report(source)


def _check_places(source: Path, destination: Path) -> None:
    """Raises CheckpointError where writing to `destination` would touch `source`."""
    here, there = source.resolve(), destination.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"{destination} and {source} lie one inside the other: choose a folder beside the source")


def _check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError where the disk cannot hold what will be written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed"
        raise CheckpointError(f"{folder.parent} has {sizes}: choose another place")


def _dtype(name: str | None) -> np.dtype | None:
    if name is None:
        return None
    from loom_jax.converters.tensors import DTYPES as KNOWN

    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return next(dtype for dtype in KNOWN.values() if dtype.name == name)


@contextlib.contextmanager
def _bar(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that moves a progress bar on by so many bytes."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.advance(task, done)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=NAME,
        description="Converts BAGEL checkpoints between the PyTorch release and Orbax.",
        epilog=_EXAMPLES.format(name=NAME),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to = commands.add_parser(
        "to-orbax",
        help="release folder -> folder that loom_jax loads",
        description="Converts a release (ema.safetensors, ae.safetensors, json, tokenizer) into a folder.\n"
        "Several processes, as loom_jax.launch starts them, share the tensors out among themselves; SRC and\n"
        "DST must lie on a disk that all of them see. The other conversions are one process.",
        epilog=f"example:\n  {NAME} to-orbax BAGEL-7B-MoT bagel_7b\n"
        "  python -m loom_jax.launch.local --command convert --processes 2 -- to-orbax BAGEL-7B-MoT bagel_7b",
    )
    to.add_argument("source", type=Path, metavar="SRC", help="release folder")
    to.add_argument("destination", type=Path, metavar="DST", help="folder to be made")
    to.add_argument("--weights", choices=("ema", "model"), help="which weights; by default what is there, ema first")
    to.add_argument("--dtype", choices=DTYPES, help="cast the transformer; by default every tensor keeps its dtype")
    to.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes; by default the cluster's")
    back = commands.add_parser(
        "from-orbax",
        help="converted folder -> release folder",
        description="Converts a folder of loom_jax back into the layout of the release. One process.",
        epilog=f"example:\n  {NAME} from-orbax bagel_7b BAGEL-again",
    )
    back.add_argument("source", type=Path, metavar="SRC", help="converted folder; may be gs:// or s3://")
    back.add_argument("destination", type=Path, metavar="DST", help="folder to be made")
    run, parts = _add_from_run(commands), _add_from_parts(commands)
    for command in (to, back, run, parts):
        command.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion left at DST")
    look = commands.add_parser(
        "inspect",
        help="what a folder holds",
        description="Checks a release or a converted folder, and prints its parts, sizes, dtypes and configuration.",
        epilog=f"example:\n  {NAME} inspect BAGEL-7B-MoT",
    )
    look.add_argument("source", type=Path, metavar="SRC", help="release folder or converted folder")
    return parser


def _add_from_run(commands: Any) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        "from-run",
        help="training run -> folder that loom_jax loads",
        description="Exports a checkpoint of a training run; from-orbax then makes a release of it.",
        epilog=f"example:\n  {NAME} from-run runs/loom_7b loom_7b --dtype bfloat16",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="the --workdir of a run")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to be made")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--weights", choices=("ema", "params"), default="ema", help="moving average, or as trained")
    parser.add_argument("--merge-lora", action="store_true", help="add low-rank adapters to the weights")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the transformer; by default as trained")
    parser.add_argument("--vae", type=Path, metavar="DIR", help="autoencoder whose decoder was trained on since, a run")
    return parser


def _add_from_parts(commands: Any) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        "from-parts",
        help="Qwen2.5 + SigLIP + FLUX autoencoder -> untrained model",
        description="Makes an untrained Bagel, as its pre-training starts, from the models that it is built of.",
        epilog=f"example:\n  {NAME} from-parts --llm Qwen2.5-7B --vit siglip-so400m --vae ae.safetensors untrained",
    )
    parser.add_argument("--llm", type=Path, required=True, metavar="DIR", help="Qwen2.5 folder")
    parser.add_argument("--vit", type=Path, required=True, metavar="DIR", help="SigLIP folder")
    parser.add_argument("--vae", type=Path, required=True, metavar="FILE", help="ae.safetensors of FLUX")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to be made")
    parser.add_argument("--max-latent-size", type=int, default=64, help="side of the latent grid, in 16 pixels (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that no part holds (0)")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage or bad input.
    """
    args = _parser().parse_args(argv)
    if args.command == "inspect":
        inspect(args.source)
        return 0
    if args.command == "to-orbax":
        return _to_orbax_together(args)
    options = {key: value for key, value in vars(args).items() if key != "command"}
    commands: dict[str, Callable[..., None]] = {
        "from-orbax": from_orbax,
        "from-run": from_run,
        "from-parts": from_parts,
    }
    commands[args.command](**options, progress=True)
    print(args.destination)
    return 0


def _to_orbax_together(args: argparse.Namespace) -> int:
    """Converts with the other processes of the job, where there are such; one of them says what happened."""
    import jax

    from loom_jax.parallel import ElsewhereError, start_distributed

    several = start_distributed(args.coordinator)
    options = {"weights": args.weights, "dtype": args.dtype, "overwrite": args.overwrite, "progress": not several}
    try:
        to_orbax(args.source, args.destination, **options)
    except ElsewhereError as error:
        return BAD_INPUT if error.bad_input else FAILED
    if jax.process_index() == 0:
        print(args.destination)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(NAME, main, sys.argv[1:]))
