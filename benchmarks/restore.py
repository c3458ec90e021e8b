"""Peak memory of restoring a sharded checkpoint: two processes, four simulated devices each.

    python -m benchmarks restore --gib 8 --out restore.json

One process writes a checkpoint of a run with widths of the 7 B model; two then restore its parameters onto a mesh of 8
devices, each its own shards. On a simulated device an array lies in the memory of its process, so a process must hold
its shards, half of the model; the promise is that it never holds more than that and one tensor, beside what the
libraries take. Needs the size twice: in memory (over both processes) and on the disk of --workdir.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import GIB, parser_of, report

ROOT = Path(__file__).resolve().parents[1]
OWN = [sys.executable, "-m", "benchmarks", "restore"]
PROCESSES, DEVICES = 2, 4
WIDTH, MLP, VOCABULARY = 3584, 18_944, 152_064
ALLOWANCE = GIB // 16
"""What compiled code and the like may take beside the arrays."""


def shapes_of(gib: float, smoke: bool) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of float32 parameters that make up about `gib`."""
    width, mlp, vocabulary = (256, 1024, 4096) if smoke else (WIDTH, MLP, VOCABULARY)
    layer = 2 * 3 * width * mlp * 4
    layers = 2 if smoke else max(1, round((gib * GIB - vocabulary * width * 4) / layer))
    shapes: dict[str, tuple[int, ...]] = {"lm_head/kernel": (width, vocabulary)}
    for expert in ("und", "gen"):
        for name in ("gate_proj", "up_proj"):
            shapes[f"decoder/layers/{expert}/{name}/kernel"] = (layers, width, mlp)
        shapes[f"decoder/layers/{expert}/down_proj/kernel"] = (layers, mlp, width)
    return shapes


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array."""
    return 4 * math.prod(shape)


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes the checkpoint as a run does, a layer at a time."""
    import numpy as np

    from loom_jax.checkpoint import ParamWriter

    rng = np.random.default_rng(0)
    (folder / "checkpoints").mkdir(parents=True)
    with ParamWriter(folder / "checkpoints" / "1") as writer:
        for path, shape in shapes.items():
            head, stacked, tail = path.partition("layers/")
            layers = range(shape[0]) if stacked else [None]
            for layer in layers:
                name = path if layer is None else f"{head}{stacked}{layer}/{tail}"
                inner = shape if layer is None else shape[1:]
                row = rng.standard_normal(inner[-1], np.float32)
                writer.write({f"trainable/{name}": np.broadcast_to(row, inner)})


def restore(number: int, address: str, folder: Path, preset: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Restores in one of the processes, and reports its memory."""
    from loom_jax.parallel import make_mesh, shardings_for, start_distributed

    start_distributed(address, PROCESSES, number)
    import jax
    import jax.numpy as jnp

    from loom_jax.checkpoint import read_run_params

    mesh = make_mesh(preset)
    abstract = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    nested: dict[str, Any] = {}
    for path, leaf in abstract.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    shardings = shardings_for(nested, mesh, preset)
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(8))())
    before = _memory("VmRSS")
    start = time.perf_counter()
    params = jax.block_until_ready(read_run_params(folder, nested, shardings, weights="params"))
    seconds = time.perf_counter() - start
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"before": before, "peak": _memory("VmHWM"), "after": _memory("VmRSS"), "shards": own, "seconds": seconds}


def _memory(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run(gib: float, smoke: bool, preset: str, workdir: Path) -> dict[str, Any]:
    """Writes, restores in two processes, and returns the report."""
    shapes = shapes_of(gib, smoke)
    subprocess.run([*OWN, "--write", str(workdir), *_sizes(gib, smoke)], check=True, cwd=ROOT)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "MALLOC_ARENA_MAX": "2",
    }
    started = []
    for number in range(PROCESSES):
        command = [*OWN, "--restore", str(number), address, str(workdir), preset]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
        started.append(subprocess.Popen([*command, *_sizes(gib, smoke)], **options))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed: " + " ".join(outputs)[-2000:])
    processes = [json.loads(output.splitlines()[-1]) for output in outputs]
    largest = max(size_of(shape[1:] if "layers/" in path else shape) for path, shape in shapes.items())
    for process in processes:
        process["ideal"] = process["before"] + process["shards"]
        process["over"] = process["peak"] - process["ideal"]
    return {
        "bytes": sum(size_of(shape) for shape in shapes.values()),
        "largest_tensor": largest,
        "allowance": ALLOWANCE,
        "preset": preset,
        "processes": processes,
        "within": all(process["over"] <= largest + ALLOWANCE for process in processes),
    }


def _sizes(gib: float, smoke: bool) -> list[str]:
    return ["--gib", str(gib), *(["--smoke"] if smoke else [])]


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns 1 where memory is not as promised."""
    parser = parser_of("restore", __doc__)
    add = parser.add_argument
    add("--gib", type=float, default=8.0, help="size of the model, at least 4 [8]; with --smoke some 16 MiB")
    add("--preset", default="fsdp", help="sharding preset")
    add("--workdir", type=Path, help="where to put the files; the system's temporary folder by default")
    add("--write", type=Path, help=argparse.SUPPRESS)
    add("--restore", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    shapes = shapes_of(args.gib, args.smoke)
    if args.write:
        write(args.write, shapes)
        return 0
    if args.restore:
        number, address, folder, preset = args.restore
        print(json.dumps(restore(int(number), address, Path(folder), preset, shapes)))
        return 0
    with tempfile.TemporaryDirectory(prefix="restore_", dir=args.workdir) as workdir:
        found = run(args.gib, args.smoke, args.preset, Path(workdir))
    _show(found, args.out)
    return 0 if found["within"] else 1


def _show(found: dict[str, Any], out: Path | None) -> None:
    names = {"shards": "own_shards", "before": "libraries_before", "peak": "peak", "over": "over_both"}
    rows = [
        {"process": n, **process, **{f"{title}_gib": process[key] / GIB for key, title in names.items()}}
        for n, process in enumerate(found.pop("processes"))
    ]
    kept = "kept" if found["within"] else "BROKEN"
    model = f"model {found['bytes'] / GIB:.2f} GiB on {PROCESSES} x {DEVICES} devices, preset {found['preset']}"
    over = f"one tensor ({found['largest_tensor'] / GIB:.2f} GiB) and {found['allowance'] / GIB:.2f} GiB"
    columns = ["process", *(f"{title}_gib" for title in names.values()), "seconds"]
    report(out, f"{model}; promise: at most {over} over: {kept}", rows, columns, **found)
