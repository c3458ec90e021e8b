"""`loom data`: writes data sets in the form that is read fastest, shows their rows, and stores latents with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.core import ArgumentParser, InputError

if TYPE_CHECKING:
    from loom_jax.data import RowCounts

NAME = "loom data"
KINDS = ("parquet", "jsonl", "folders", "array_record", "synthetic", "world")
DRAWN = ("synthetic", "world")
_TURNS = ("tutorial", "image_tutorial", "decomposition")
_PLANNED = [f"{task}{part}" for task in _TURNS for part in ("", "_frames", "_plan")]
RECIPE_NAMES = ("t2i", "edit", "vlm", *_PLANNED, "composition", "style")
"""Those of loom_jax.data, which the help does not import."""
EPILOG = """examples:
  loom data build data/edit --source parquet --recipe edit --out built/edit
  loom data inspect built/edit --source array_record --recipe edit --out rows.html
  loom data encode built/edit --source array_record --recipe edit --checkpoint bagel_7b --out encoded/edit
"""


def main(argv: list[str]) -> int:
    """Runs one of the subcommands and returns the exit status.

    Raises:
      InputError: bad usage or data that is not there.
      LoomError: too many rows are bad, or the disk is full.
    """
    parser = ArgumentParser(prog=NAME, description="Build, look at and encode data sets.", epilog=EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = _subcommand(commands, "build", "write rows as array_record files, with checksums and counts", run_build)
    build.add_argument("--limit", type=int, metavar="N", help="stop after so many rows")
    inspect = _subcommand(commands, "inspect", "write an HTML page that shows rows as documents", run_inspect)
    inspect.add_argument("--rows", type=int, default=20, metavar="N", help="how many rows to show [20]")
    inspect.add_argument("--start", type=int, default=0, metavar="I", help="from which row on [0]")
    inspect.add_argument("--seed", type=int, default=0, help="of the random choices of the recipe [0]")
    inspect.add_argument("--tokenizer", type=Path, metavar="DIR", help="count tokens with the tokenizer in this folder")
    inspect.add_argument("--verify", action="store_true", help="compare checksums of array_record files")
    encode = _subcommand(commands, "encode", "write rows with the latents of their pictures", run_encode)
    encode.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder with the autoencoder")
    encode.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the latents [float16]")
    encode.add_argument("--limit", type=int, metavar="N", help="stop after so many rows")
    for each in (inspect, encode):
        add = each.add_argument
        add("--vae-transform", type=int, nargs=3, default=(1024, 512, 16), metavar=("MAX", "MIN", "STRIDE"))
    inspect.add_argument("--vit-transform", type=int, nargs=3, default=(980, 224, 14), metavar=("MAX", "MIN", "STRIDE"))
    args = parser.parse_args(argv)
    return args.run(args)


def _subcommand(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EPILOG)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, folders or patterns; none for synthetic; a split for world",
    )
    add("--source", choices=KINDS, required=True, help="how the rows are stored")
    add("--recipe", choices=RECIPE_NAMES, required=True, help="what the rows are for; rows it cannot use are left out")
    add("--images", metavar="DIR", help="folder that file names in a jsonl are relative to")
    add("--out", type=Path, required=True, metavar="PATH", help="what to write: a new folder, or an HTML file")
    add("--max-bad-share", type=float, default=0.05, metavar="X", help="stop above this share of bad rows [0.05]")
    return parser


def run_build(args: argparse.Namespace) -> int:
    """Copies rows into array_record files."""
    return _write(args, lambda row: row)


def run_encode(args: argparse.Namespace) -> int:
    """Copies rows into array_record files, with the latents of their pictures."""
    import jax.numpy as jnp
    from flax import nnx

    from loom_jax.checkpoint import load_module, read_folder
    from loom_jax.document import ImageTransform
    from loom_jax.models import Autoencoder
    from loom_jax.train.encode_latents import LatentEncoder

    folder = read_folder(args.checkpoint)
    vae = load_module(folder, "vae", lambda config: Autoencoder(config.vae, rngs=nnx.Rngs(0)), dtype=jnp.float32)
    transform = ImageTransform(*args.vae_transform)
    encoder = LatentEncoder(vae, transform, folder.config.latent_patch_size, dtype=args.dtype)
    return _write(args, encoder.add_to)


def run_inspect(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is."""
    from loom_jax.commands.data_page import write_page
    from loom_jax.data import damaged_files

    if args.verify:
        damaged = [name for path in args.paths for name in damaged_files(Path(path))]
        if damaged:
            raise InputError(f"checksums differ for {', '.join(damaged)}: build or copy these files anew")
    shown = write_page(args, _open(args))
    print(f"{args.out}: {shown} rows")
    return 0


def _open(args: argparse.Namespace) -> Any:
    from loom_jax.data import open_source

    if args.source == "synthetic" and args.paths:
        raise InputError(f"synthetic rows are drawn, they have no files: leave out {args.paths[0]}")
    return open_source(args.source, args.paths, images=args.images, recipe=args.recipe)


def _write(args: argparse.Namespace, change: Any) -> int:
    from loom_jax.data import RowCounts, write_rows

    source = _open(args)
    if args.source in DRAWN and not args.limit:
        raise InputError(f"{args.source} rows have no natural end ({len(source)} an epoch): say how many with --limit")
    counts = RowCounts(args.max_bad_share, min_rows=200)
    for fault in source.bad_files:
        print(f"{NAME}: left out: {fault}", file=sys.stderr)
    facts = {"source": args.source, "recipe": args.recipe, "bad": counts.bad}
    if args.source not in DRAWN:
        facts["bad_files"] = [str(fault) for fault in source.bad_files]
    description = f"{args.recipe} rows from {args.source}"
    record = write_rows(_good_rows(source, args, counts, change), args.out, description, facts)
    size = sum(file["bytes"] for file in record["files"].values())
    print(f"{args.out}: {record['rows']} rows in {len(record['files'])} files, {size / 2**20:.1f} MiB")
    print(f"bad rows: {counts.summary()}")
    return 0


def _good_rows(source: Any, args: argparse.Namespace, counts: RowCounts, change: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows that the recipe can use, changed; counts all."""
    import numpy as np

    from loom_jax.data import RECIPES, BadRow

    build, limit = RECIPES[args.recipe].build, len(source) if args.limit is None else min(args.limit, len(source))
    for index in range(limit):
        try:
            row = source[index]
            build(row, np.random.default_rng(index))
            changed = change(row)
        except BadRow as fault:
            counts.add(fault, f"(row {index})")
            continue
        counts.add(None)
        yield changed
