"""`loom plan`: compiles a training step or the sampling loop for TPUs that are not there, and says what it needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from loom_jax.commands.train import CONFIG, read_config, read_recipe
from loom_jax.core import ArgumentParser, ConfigError, InputError, LoomConfig, from_mapping

NAME = "loom plan"
EPILOG = """examples:
  loom plan --config configs/bagel_7b_finetune.py:v5p-64 --topology v5p:4x4x4 --preset hsdp --tokens 8192 \\
      --config.data.latents=moments
  loom plan --config configs/bagel_7b.py --topology v6e:2x2 --preset fsdp --sample --pictures 4

Nothing is allocated and no TPU is needed, but libtpu is: pip install "jax[tpu]". Topologies are written with the chips
a side: v5p:4x4x4 (64 chips, sold as v5p-128), v5p:2x4x4 (v5p-64), v6e:8x8 (v6e-64), v6e:16x16 (v6e-256). A step of
7 B parameters compiles in some minutes. Exit status 1 says that the job does not fit."""
GIB = 2.0**30

NOTES = {
    "gradients": "   by arithmetic",
    "activations": "   with gathered weights: all else that the compiler sets aside",
}
"""What `describe` says beside a kind of memory."""


def main(argv: list[str]) -> int:
    """Runs the command; returns 1 where the job does not fit.

    Raises:
      InputError: bad usage, a configuration or topology that cannot be used, or libtpu is missing.
    """
    overrides = [a.removeprefix(f"{CONFIG}.") for a in argv if a.startswith(f"{CONFIG}.")]
    args = _parser().parse_args([a for a in argv if not a.startswith(f"{CONFIG}.")])
    recipe = read_recipe(args.config)
    devices = topology_devices(args.topology)
    report = (_sampling if args.sample else _training)(args, recipe, overrides, devices)
    print(json.dumps(report, indent=2) if args.json else "\n".join(describe(report)))
    return 0 if report["fits"] else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=NAME, description="Plan a job for TPUs that are not there.", epilog=EPILOG)
    add = parser.add_argument
    add(CONFIG, type=Path, required=True, metavar="FILE", help="recipe, or a variant of one: FILE:VARIANT")
    add("--topology", required=True, metavar="KIND:SIDES", help="chips, such as v5p:4x4x4")
    add("--preset", help="how the job lies on them, in place of the recipe's")
    add("--mesh", metavar="AXIS=N,...", help="sizes of the mesh axes, where the preset's own do not fit")
    add("--rows", type=int, metavar="N", help="packed rows of each data shard [1]")
    add("--tokens", type=int, metavar="N", help="tokens of a row, und and gen in the recipe's proportion")
    add("--search", action="store_true", help="compile for twice the rows, until it does not fit")
    add("--sample", action="store_true", help="plan the sampling loop instead of the training step")
    add("--pictures", type=int, default=1, metavar="N", help="pictures at once, with --sample [1]")
    add("--side", type=int, default=1024, metavar="PIXELS", help="of a picture, with --sample [1024]")
    add("--json", action="store_true", help="print everything as JSON")
    return parser


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of a TPU topology that is not there.

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('plans need libtpu, the TPU compiler (no TPU): pip install "jax[tpu]" installs it')
    # libtpu must not look for a TPU, nor keep other plans from running.
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.update(quiet)
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"topology {topology!r} is unknown ({reason}): expected one like v5p:4x4x4 or v6e:8x8"
        ) from error


def _mesh_sizes(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and size.isdigit() for name, _, size in pairs):
        raise InputError(f"--mesh {text}: expected axes with sizes, such as data=2,fsdp=32")
    return {name: int(size) for name, _, size in pairs}


def _training(args: Any, recipe: dict[str, Any], overrides: list[str], devices: list[Any]) -> dict[str, Any]:
    from loom_jax.train.plan import fit_config, plan_mesh, plan_training

    config = read_config(recipe, overrides)
    changes: dict[str, Any] = {} if args.preset is None else {"preset": args.preset, "axes": (), "sizes": ()}
    if args.mesh:
        sizes = _mesh_sizes(args.mesh)
        changes |= {"axes": tuple(sizes), "sizes": tuple(sizes.values())}
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **changes))
    mesh = plan_mesh(config, devices)
    rows = args.rows or 1
    report = plan_training(fit_config(config, mesh, rows, args.tokens), mesh)
    tried = report
    while args.search and tried["fits"]:
        report["rows_compiled"] = rows
        rows *= 2
        tried = plan_training(fit_config(config, mesh, rows, args.tokens), mesh)
    return report


def _sampling(args: Any, recipe: dict[str, Any], overrides: list[str], devices: list[Any]) -> dict[str, Any]:
    from loom_jax.generate.plan import Sampling, plan_sampling
    from loom_jax.parallel import make_mesh

    if overrides:
        raise ConfigError(f"--config.{overrides[0]} changes nothing of the sampling loop: leave it out with --sample")
    preset = args.preset or "fsdp"
    mesh = make_mesh(_mesh_sizes(args.mesh) if args.mesh else preset, devices)
    model = from_mapping(LoomConfig, recipe["model"])
    return plan_sampling(model, mesh, preset, "auto", Sampling(pictures=args.pictures, side=args.side))


def describe(report: dict[str, Any]) -> list[str]:
    """Returns a report as lines for people."""
    axes = ", ".join(f"{name} {size}" for name, size in report["mesh"].items())
    lines = [f"{report['chips']} x {report['chip']} ({axes})"]
    if "tokens_per_row" in report:
        lines.append(f"{report['rows_per_shard']} rows of {report['tokens_per_row']:,} tokens on each data shard")
    lines.append(f"memory of a chip, GiB of {report['memory_limit'] / GIB:.2f}:")
    lines += [f"  {kind:12} {size / GIB:8.2f}{NOTES.get(kind, '')}" for kind, size in report["memory"].items()]
    if "refused" in report:
        return [*lines, f"does not fit: {report['refused']}", _counts(report), *_advice(report)]
    total, limit = report["memory_total"], report["memory_limit"]
    lines.append(
        f"  {'in all':12} {total / GIB:8.2f}   {'fits' if report['fits'] else 'does not fit'} with 10 % to spare"
    )
    if total > limit:
        lines[-1] += f", {(total - limit) / GIB:.2f} too many"
    lines.append(f"TFLOP of a chip: {report['flops_compiled'] / 1e12:,.1f} as compiled (recomputed ones included)")
    if "flops_formula" in report:
        lines[-1] += f", {report['flops_formula'] / 1e12:,.1f} by the formula"
    lines.append("sent by a chip, GiB:")
    lines += [f"  {k:20} {v['bytes'] / GIB:8.2f} in {v['calls']} calls" for k, v in report["collectives"].items()]
    s = report["seconds"]
    parts = f"{s['compute']:.3f} computing + {s['kernels']:.3f} in kernels (at peak) + {s['links']:.3f} on links"
    lines.append(
        f"seconds, estimated: {parts} = {s['serial']:.3f}; {s['overlapped']:.3f} if all is overlapped; "
        f"floor {report['floor_seconds']:.3f}"
    )
    if "layers" in report:
        layers = report["layers"]
        lines.append(f"layers: {layers['seconds']:.3f} s, {layers['ratio']:.3f} x their matrix FLOPs at peak")
    flops, mfu = "the formula" if "flops_formula" in report else "the FLOPs as compiled", report["mfu"]
    lines.append(f"MFU of {flops}, estimated: {mfu['serial']:.1%}; {mfu['overlapped']:.1%} if all is overlapped")
    return [*lines, _counts(report), *_advice(report), f"compiled in {report['compile_seconds']:.0f} s"]


def _counts(report: dict[str, Any]) -> str:
    """How many rows or pictures fit; where the compiler refused, no more than that these do not is known."""
    rows = "rows_per_shard" in report
    what, tried = ("rows of a data shard", report["rows_per_shard"]) if rows else ("pictures", report["pictures"])
    if "refused" in report:
        return f"{what} that fit: fewer than {tried}"
    fit = report.get("rows_compiled", report["rows_that_fit"]) if rows else report["pictures_that_fit"]
    return f"{what} that fit: {fit}"


def _advice(report: dict[str, Any]) -> list[str]:
    return [f"advice: {line}" for line in report.get("advice", [])]
