"""The loss on rows that are never trained on, with the same rows, timesteps and noise every time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from loom_jax.data import TrainBatch
from loom_jax.parallel import batch_sharding, global_batch
from loom_jax.train.job import Job
from loom_jax.train.losses import LossSums, mean_losses
from loom_jax.train.state import TrainState
from loom_jax.train.step import batch_losses, draw

SEED_OFFSET = 1_000_003
"""Added to the seed, so that held-out draws are not those of any step of training."""


class HeldOut:
    """Measures the held-out loss of a job; does nothing where the job has none."""

    def __init__(self, job: Job):
        watch = job.config.watch
        self._job, self._every, self._batches = job, watch.held_out_every, watch.held_out_batches
        config = dataclasses.replace(job.config, seed=job.config.seed + SEED_OFFSET)
        parts = dataclasses.replace(job.parts, config=config)

        def sums(state: TrainState, vae_params: Any, batch: TrainBatch, number: jax.Array) -> LossSums:
            draws = draw(parts, vae_params, batch, number)
            return batch_losses(parts, state.trainable, state.frozen, batch.batch, draws)

        self._sums = jax.jit(sums, in_shardings=(job.shardings, None, batch_sharding(job.mesh), None))

    def due(self, step: int) -> bool:
        """Whether `step` is one of those after which it is measured."""
        return self._every > 0 and step % self._every == 0

    def measure(self, state: TrainState) -> dict[str, float]:
        """Returns `held_out/ce` and `held_out/mse`, means over all batches; a modality without labels gives 0."""
        data = self._job.open_data(self._job.config.held_out)
        total: LossSums | None = None
        for number in range(self._batches):
            batch = global_batch(next(data), self._job.mesh)
            sums = self._sums(state, self._job.vae_params, batch, jnp.int32(number))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        data.close()
        assert total is not None
        ce, mse = mean_losses(total, self._job.config.loss.reweight)
        return {"held_out/ce": float(ce), "held_out/mse": float(mse)}
