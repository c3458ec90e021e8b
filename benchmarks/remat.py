"""What each remat policy costs and saves: seconds of a training step, and the bytes that it sets aside.

    python -m benchmarks remat

The same step of the same batch under every policy, in turns, in one run. Memory is the compiler's: activations,
gradients and what else stands between a step's arguments and its results. Of a model of
billions of parameters `loom plan --config.remat=POLICY` says the same without one.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from benchmarks.report import MIB, best_and_median, parser_of, report
from benchmarks.training import configure, keep_stepping, pipeline_rate
from loom_jax.nn import REMAT_POLICIES
from loom_jax.parallel import global_batch
from loom_jax.train import build_job


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = parser_of("remat", __doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="measurements, of which the best counts [5]"
    )
    args = parser.parse_args(argv)
    config = configure(args.smoke)
    jobs = {name: build_job(dataclasses.replace(config, remat=name)) for name in REMAT_POLICIES}
    _, batch = pipeline_rate(jobs["full"], 1)
    calls, losses, memory = {}, {}, {}
    for name, job in jobs.items():
        placed = global_batch(batch, job.mesh)
        compiled = job.step.lower(job.abstract_state, job.vae_params, placed).compile()
        calls[name], losses[name] = keep_stepping(dataclasses.replace(job, step=compiled), batch)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    took = best_and_median(calls, 1 if args.smoke else args.repeats)
    for name in jobs:
        np.testing.assert_allclose(losses[name], losses["full"], rtol=1e-3)
    rows = [
        {
            "remat": name,
            "seconds": best,
            "seconds_median": median,
            "over_full": best / took["full"][0],
            "mib": memory[name] / MIB,
            "mib_over_full": memory[name] / memory["full"],
        }
        for name, (best, median) in took.items()
    ]
    budget = config.data.budget
    report(args.out, f"a row of {budget.und} und and {budget.gen} gen tokens, {jax.devices()[0].device_kind}", rows)
    return 0
