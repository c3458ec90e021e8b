"""Sample pictures while training: the same prompts and seeds every time, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from loom_jax.generate.engine import Engine
from loom_jax.generate.generator import Generator
from loom_jax.generate.requests import Request
from loom_jax.models import Backend
from loom_jax.train import Hook, Job, TrainState


class SamplePictures:
    """Draws `watch.sample_prompts` into `samples/<step>/` of the run folder, by the moving average if there is one."""

    def __init__(self, job: Job, workdir: Path):
        self._job, self._folder = job, workdir / "samples"
        self._engine: Engine | None = None

    def due(self, step: int) -> bool:
        """Whether pictures are drawn after `step`."""
        every = self._job.config.watch.sample_every
        return every > 0 and step % every == 0

    def run(self, step: int, state: TrainState) -> None:
        """Draws the pictures; every process takes part, the first one writes."""
        job, parts = self._job, self._job.parts
        weights = state.trainable if state.ema is None else state.ema
        model = nnx.merge(parts.graphdef, weights, state.frozen)
        if self._engine is None:
            vae = nnx.merge(parts.vae_graphdef, job.vae_params)
            tokenizer, backend = job.encoder.tokenizer, Backend(parts.attend, parts.constrain)
            self._engine = Engine(model, vae, tokenizer.special, len(tokenizer), backend)
        self._engine.use_weights(model)
        generator = Generator(job.config.model, self._engine, job.encoder)
        requests = [Request((prompt,), seed=i) for i, prompt in enumerate(job.config.watch.sample_prompts)]
        results = generator.generate(requests)
        if jax.process_index() == 0:
            folder = self._folder / str(step)
            folder.mkdir(parents=True, exist_ok=True)
            for number, result in enumerate(results):
                assert result.image is not None
                result.image.save(folder / f"{number}.png")


def sample_hooks(job: Job, workdir: Path) -> Sequence[Hook]:
    """Returns the hooks of a job: sample pictures, where it names prompts."""
    return [SamplePictures(job, workdir)] if job.config.watch.sample_prompts else []
