"""Guided pictures in one batched, compiled loop, against one branch, one request and one step at a time.

    python -m benchmarks sampling --requests 4 --out sampling.json

Edits of a picture, so that guidance has three branches, on a random model of 12.1 million parameters; prompts are read
beforehand. `alone` is the same loop for each request by itself; `by branch` calls a compiled forward pass for each
branch of each request in each step and combines them between the calls, as the original does. All must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.cpu_step import CONFIG, TOKENIZER, smaller
from benchmarks.report import best_and_median, parser_of, report
from loom_jax import api
from loom_jax.converters.synthetic import write_synthetic_release
from loom_jax.core import LoomConfig
from loom_jax.data import Budget, Packable, Tables, pack
from loom_jax.document import ImageTokens, lay_out
from loom_jax.generate import Generator, Query, Read
from loom_jax.generate.denoise import branch_velocity
from loom_jax.generate.generator import branch_segments
from loom_jax.generate.guidance import guide
from loom_jax.generate.reader import make_guidance
from loom_jax.nn import denoising_schedule

BRANCHES, AGREE = 3, 1e-3


class Work:
    """Some edits of one size, read already."""

    def __init__(self, generator: Generator, count: int, side: int, steps: int):
        self.generator, self.side = generator, side
        self.settings = api.ImageSettings(num_timesteps=steps, cfg_interval=(0.0, 1.0), cfg_img_scale=2.0)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8))
        prompts = [f"make it {colour}" for colour in ("red", "green", "blue", "yellow", "grey", "pink")[:count]]
        requests = [api.Request((picture, prompt), task="edit", seed=seed) for seed, prompt in enumerate(prompts)]
        self.sources = [generator.read_request(request) for request in requests]
        self.queries = [Query((side, side), seed) for seed in range(count)]
        self.together = self._read(range(count))
        self.alone = [self._read([i]) for i in range(count)]
        self.by_branch = [[self._read([i], [b]) for b in range(BRANCHES)] for i in range(count)]
        self._velocity, self._guide = self._compile()

    def _read(self, members: Sequence[int], branches: Sequence[int] = range(BRANCHES)) -> Read:
        documents = [branch_segments(self.sources[i], None) for i in members]
        latents = [(self.sources[i].latents, self.sources[i].latents, ()) for i in members]
        texts, pictures = ([row[b] for b in branches for row in rows] for rows in (documents, latents))
        return self.generator.read(texts, pictures)

    def _compile(self) -> tuple[Any, Any]:
        graphdef, self._params = nnx.split(self.generator.engine.model())
        guidance = make_guidance(self.settings, [self.settings.cfg_img_scale])
        held = jnp.ones((1, (self.side // self.generator.config.latent_stride) ** 2), bool)

        def velocity(params: Any, context: Any, streams: Any, x: jax.Array, t: jax.Array) -> jax.Array:
            return branch_velocity(nnx.merge(graphdef, params), context, streams, x, t)

        return jax.jit(velocity), jax.jit(lambda parts: guide(*parts, guidance, "global", held))

    def batched(self) -> list[np.ndarray]:
        """All requests and branches in one loop."""
        return self._denoise(self.together, self.queries)

    def one_by_one(self) -> list[np.ndarray]:
        """A loop for each request."""
        return [self._denoise(read, [query])[0] for read, query in zip(self.alone, self.queries, strict=True)]

    def _denoise(self, read: Read, queries: Sequence[Query]) -> list[np.ndarray]:
        *_, (_, made) = self.generator.denoise(read, queries, self.settings, BRANCHES)
        return made

    def branch_by_branch(self) -> list[np.ndarray]:
        """A call for each branch of each request in each step."""
        return [self._integrate(reads, query) for reads, query in zip(self.by_branch, self.queries, strict=True)]

    def _integrate(self, reads: Sequence[Read], query: Query) -> np.ndarray:
        config, cells = self.generator.config, self.side // self.generator.config.latent_stride
        image = [ImageTokens("noisy", (cells, cells))]
        special = self.generator.encoder.special
        rows = [[Packable(image, lay_out(image, special, read.ends[0]))] for read in reads]
        streams = [pack([row], Budget(2, cells * cells, 0), Tables.of(config)).streams for row in rows]
        x = jnp.asarray(self.generator.noise.initial(query.seed, query.number, cells * cells, config.latent_dim))[None]
        schedule = denoising_schedule(self.settings.num_timesteps, self.settings.timestep_shift)
        for now, after in zip(schedule, schedule[1:], strict=False):
            parts = [
                self._velocity(self._params, read.context, stream, x, now)
                for read, stream in zip(reads, streams, strict=True)
            ]
            x = x - self._guide(parts) * (now - after)
        return np.asarray(x[0])


def build(config: LoomConfig, folder: Path) -> Generator:
    """Returns a random model."""
    write_synthetic_release(folder / "release", config, dtype=lambda key: np.dtype(np.float32), tokenizer=TOKENIZER)
    api.convert(folder / "release", folder / "model")
    return api.load(folder / "model")


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns 1 where the three ways disagree."""
    parser = parser_of("sampling", __doc__)
    add = parser.add_argument
    add("--requests", type=int, default=4, metavar="N", help="requests, at most 6 [4]")
    add("--side", type=int, default=128, metavar="PIXELS", help="of the pictures [128]")
    add("--steps", type=int, default=9, metavar="N", help="points of the schedule [9]")
    add("--repeats", type=int, default=5, metavar="N", help="measurements, of which the best counts [5]")
    args = parser.parse_args(argv)
    count, side, steps, repeats = (2, 32, 3, 1) if args.smoke else (args.requests, args.side, args.steps, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(build(smaller() if args.smoke else CONFIG, Path(folder)), count, side, steps)
        ways = {"batched": work.batched, "alone": work.one_by_one, "by branch": work.branch_by_branch}
        made = {name: np.stack(way()) for name, way in ways.items()}
        took = best_and_median(ways, repeats)
    rms = float(np.sqrt(np.mean(made["batched"] ** 2)))
    rows = [
        {
            "way": name,
            "seconds": best,
            "seconds_median": median,
            "over_batched": best / took["batched"][0],
            "difference": float(np.abs(made[name] - made["batched"]).max()) / rms,
        }
        for name, (best, median) in took.items()
    ]
    work_done = f"{count} guided edits of {side} x {side}, {steps - 1} steps x {BRANCHES} branches"
    report(args.out, f"{work_done}, {jax.devices()[0].device_kind}", rows)
    return 0 if all(row["difference"] < AGREE for row in rows) else 1
