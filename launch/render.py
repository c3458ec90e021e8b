"""`python -m loom_jax.launch.render KIND ...`: writes the script or manifest of a job, or submits it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from loom_jax.core import ArgumentParser, InputError, LoomError, run_command
from loom_jax.launch.arguments import add_job_flags, add_machine_flags, read_job
from loom_jax.launch.scripts import KINDS, Kind, render_job

NAME = "loom_jax.launch.render"
EPILOG = """examples:
  python -m loom_jax.launch.render slurm --config configs/bagel_7b_finetune.py --workdir runs/7b \\
      --config.init_from=bagel_7b --nodes 4 --devices-per-node 8 --partition gpu --time-limit 12:00:00 --dry-run
  python -m loom_jax.launch.render jobset --config configs/bagel_7b_finetune.py --workdir /data/runs/7b \\
      --config.init_from=/data/bagel_7b --claim data=/data --accelerator tpu --tpu v5p --topology 4x4x4 --nodes 16 \\
      --image REGISTRY/loom:1 --out 7b.yaml

--dry-run prints what would be submitted, --out writes it; without either it is submitted."""


def main(argv: list[str]) -> int:
    """Runs the command.

    Raises:
      InputError: bad usage, or a job that cannot be.
      LoomError: it could not be submitted.
    """
    parser = ArgumentParser(prog=f"python -m {NAME}", description=__doc__, epilog=EPILOG)
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--dry-run", action="store_true", help="print, and submit nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, and submit nothing")
    add_job_flags(parser)
    add_machine_flags(parser)
    parser.add_argument("--gpu-type", metavar="LABEL", help="GKE's label of the GPUs, such as nvidia-h100-80gb")
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="persistent volume claim, and where pods see it",
    )
    job, args = read_job(parser, argv)
    if any("=" not in claim for claim in args.claim):
        raise InputError(f"--claim {args.claim}: expected NAME=PATH")
    text = render_job(args.kind, job, args.gpu_type, dict(claim.split("=", 1) for claim in args.claim))
    if args.dry_run:
        print(text, end="")
    elif args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        print(args.out)
    else:
        _submit(KINDS[args.kind], text)
    return 0


def _submit(kind: Kind, text: str) -> None:
    with tempfile.TemporaryDirectory(prefix="loom_job_") as scratch:
        file = Path(scratch) / kind.template.removesuffix(".j2")
        file.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*kind.submit, file], check=True)
        except FileNotFoundError as error:
            raise LoomError(f"there is no {kind.submit[0]} on this machine: write the file with --out FILE") from error
        except subprocess.CalledProcessError as error:
            raise LoomError(f"{shlex.join(kind.submit)} ended with status {error.returncode}") from error


if __name__ == "__main__":
    sys.exit(run_command(NAME, main, sys.argv[1:]))
