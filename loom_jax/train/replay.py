"""Looking at one step again: its batch, rebuilt and dumped, and the norms of every layer and gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.checkpoint import RunCheckpoints, read_run, saved_steps
from loom_jax.core import InputError
from loom_jax.data import TrainBatch
from loom_jax.parallel import global_batch
from loom_jax.train.config import TrainConfig
from loom_jax.train.job import Job, build_job
from loom_jax.train.losses import training_forward
from loom_jax.train.state import TrainState
from loom_jax.train.step import draw, gradients


def replay(config: TrainConfig, workdir: Path, step: int) -> Path:
    """Rebuilds the batch of a step and measures the model on it; returns the folder of what it found.

    The data goes on from the last checkpoint before the step (or from the start), and the weights are those of that
    checkpoint; the draws are those of the step. Writes batch.npz (every array by its path; of a job of several
    processes batch_<process>.npz, the rows of each) and norms.json.

    Raises:
      InputError: the step is not one of the run, or `workdir` is no run of this configuration.
    """
    read_run(workdir)
    if not 1 <= step <= config.total_steps:
        raise InputError(f"--replay-step {step}: the run has steps 1 to {config.total_steps}")
    job = build_job(config)
    before = [saved for saved in saved_steps(workdir) if saved < step]
    data = job.open_data()
    if before:
        restored = RunCheckpoints(workdir).restore(job.abstract_state, job.shardings, before[-1])
        assert restored is not None
        state = restored.state
        data.set_state(restored.own_data())
    else:
        state = job.new_state()
    for _ in range(step - (before[-1] if before else 0)):
        batch = next(data)
    data.close()
    folder = workdir / f"replay_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = _named(batch)
    part = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    np.savez_compressed(folder / f"batch{part}.npz", **arrays)
    norms = _norms(job, state._replace(step=jnp.int32(step - 1)), global_batch(batch, job.mesh))
    found = {"step": step, "weights_of_step": before[-1] if before else 0, **norms}
    if jax.process_index() == 0:
        (folder / "norms.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return folder


def _named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a batch by their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(getattr(k, "name", getattr(k, "idx", k))) for k in path): np.asarray(a) for path, a in leaves}


def _norms(job: Job, state: TrainState, batch: TrainBatch) -> dict[str, Any]:
    """Root mean squares of every layer's output, and norms of every parameter's gradient."""
    parts = job.parts

    @jax.jit
    def measure(state: TrainState, vae_params: Any, batch: TrainBatch) -> Any:
        draws = draw(parts, vae_params, batch, state.step)
        grads, sums = gradients(parts, state, batch.batch, draws)
        model = nnx.merge(parts.graphdef, state.trainable, state.frozen)
        decoded = training_forward(
            model, batch.batch.streams, *draws, attend=parts.attend, constrain=parts.constrain, return_layers=True
        )
        layers = jax.tree.map(lambda a: jnp.sqrt(jnp.mean(a.astype(jnp.float32) ** 2, axis=(1, 2, 3))), decoded.layers)
        return layers, jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g.astype(jnp.float32) ** 2)), grads), sums

    layers, grads, sums = jax.device_get(measure(state, job.vae_params, batch))
    return {
        "losses": {name: float(value) for name, value in sums._asdict().items()},
        "und_layer_rms": [float(v) for v in layers[0]],
        "gen_layer_rms": [float(v) for v in layers[1]],
        "gradient_norm": dict(zip(job.names, (float(g) for g in jax.tree.leaves(grads)), strict=True)),
    }
