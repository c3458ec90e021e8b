"""How long the training step takes to trace and to compile, by the number of layers.

    python -m benchmarks compilation --out compilation.json

Layers are stacked and scanned, so it should hardly depend on them. The step is that of a small recipe at other depths;
nothing is allocated and no cache of compiled code is used. `cpu seconds` are those of all threads of the process, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import parser_of, report
from loom_jax.commands.train import read_config, read_recipe
from loom_jax.data import Tables, abstract_batch
from loom_jax.parallel import make_mesh
from loom_jax.train import TrainConfig
from loom_jax.train.job import draft_step

RECIPE = Path(__file__).parents[1] / "configs" / "tiny.py"


def main(argv: list[str]) -> int:
    """Compiles the step of each depth in turns; the ratios are to the first depth."""
    parser = parser_of("compilation", __doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 28], metavar="N", help="depths [4 28]")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="compilations of each [3]")
    args = parser.parse_args(argv)
    depths, repeats = ([2, 4], 1) if args.smoke else (args.layers, args.repeats)
    jax.config.update("jax_enable_compilation_cache", False)
    times: dict[int, list[tuple[float, float]]] = {depth: [] for depth in depths}
    for _ in range(repeats):
        for depth in depths:
            times[depth].append(seconds_to_compile(config_of(depth)))
    best = {depth: np.min(found, axis=0) for depth, found in times.items()}
    rows: list[dict[str, Any]] = [
        {
            "layers": depth,
            "seconds": float(wall),
            "cpu_seconds": float(cpu),
            "ratio": float(wall / best[depths[0]][0]),
            "cpu_ratio": float(cpu / best[depths[0]][1]),
        }
        for depth, (wall, cpu) in best.items()
    ]
    report(args.out, f"Tracing and compiling the training step, best of {repeats}", rows)
    return 0


def config_of(depth: int) -> TrainConfig:
    """Returns the small recipe with another number of layers."""
    return read_config(read_recipe(RECIPE), [f"model.decoder.num_layers={depth}"])


def seconds_to_compile(config: TrainConfig) -> tuple[float, float]:
    """Returns the seconds of the clock and of all processors that tracing and compiling a step takes."""
    jax.clear_caches()
    began = time.perf_counter(), time.process_time()
    draft = draft_step(config, make_mesh("single"))
    batch = abstract_batch(config.data, Tables.of(config.model), config.model.latent_stride)
    draft.step.lower(draft.state, draft.vae, batch).compile()
    return time.perf_counter() - began[0], time.process_time() - began[1]
