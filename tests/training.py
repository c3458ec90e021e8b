"""A training job small enough to be compiled often: sizes that meshes of eight divide, pictures of two by two cells."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from loom_jax.core import apply_overrides, from_mapping
from loom_jax.data import Tables, TrainBatch, make_pipeline
from loom_jax.document import Tokenizer, make_encoder
from loom_jax.parallel import global_batch
from loom_jax.train import Job, TrainConfig, build_job, draft_step

RECIPE: dict[str, Any] = {
    "model": {
        "decoder": {
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
        },
        "vit": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_layers": 3,
            "num_heads": 2,
            "patch_size": 6,
            "num_positions": 36,
            "layer_norm_eps": 1e-6,
        },
        "vae": {
            "ch": 32,
            "ch_mult": (1, 1),
            "num_res_blocks": 1,
            "z_channels": 4,
            "scale_factor": 0.4,
            "shift_factor": 0.1,
        },
        "max_latent_size": 9,
        "vit_max_num_patch_per_side": 6,
        "latent_patch_size": 2,
    },
    "data": {
        "mixture": [
            {
                "name": recipe,
                "source": "synthetic",
                "recipe": recipe,
                "vae_transform": {"max_size": 20, "min_size": 12, "stride": 4},
                "vit_transform": {"max_size": 18, "min_size": 12, "stride": 6},
            }
            for recipe in ("t2i", "edit", "vlm")
        ],
        "rows": 8,
        "budget": {"und": 224, "gen": 80, "vit": 30},
        "canvases": [{"height": 20, "width": 20, "count": 4}],
    },
    "total_steps": 6,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-8},
    "ema": {"decay": 0.9},
    "frozen": ("vit/*",),
    "remat": "none",
    "save": {"every": 2},
    "watch": {"log_every": 1},
}
"""Two rows on each of four devices, or one on each of eight."""


def config(*overrides: str) -> TrainConfig:
    """Returns the configuration with overrides such as `optimizer.clip_norm=0`."""
    return from_mapping(TrainConfig, apply_overrides(RECIPE, overrides))


def train_batch(given: TrainConfig, number: int = 1) -> TrainBatch:
    """Returns batch `number` of a job's data, in numpy."""
    encoder = make_encoder(given.model, Tokenizer.of_bytes())
    pipeline = make_pipeline(given.data, encoder, Tables.of(given.model))
    batches = [next(pipeline) for _ in range(number)]
    pipeline.close()
    return batches[-1]


@functools.cache
def base() -> Job:
    """The job of the plain configuration, compiled once."""
    return build_job(config())


@functools.cache
def start() -> Any:
    """A first state in numpy whose parameters all matter: no kernel is zero, no scale is one."""
    return shaken(base().new_state())


def shaken(state: Any) -> Any:
    """Returns a state with a little noise on all parameters, in numpy; its average begins at them."""
    rng = np.random.default_rng(0)

    def shake(a: Any) -> np.ndarray:
        return np.asarray(a + 0.05 * rng.standard_normal(a.shape), np.asarray(a).dtype)

    trainable, frozen = jax.tree.map(shake, (state.trainable, state.frozen))
    host = jax.device_get(state)
    return host._replace(trainable=trainable, frozen=frozen, ema=trainable if state.ema is not None else None)


@functools.cache
def vae_params() -> Any:
    return jax.device_get(base().vae_params)


def take_step(given: TrainConfig, mesh: Mesh, state: Any = None, batch: TrainBatch | None = None) -> Any:
    """Runs one step of a configuration on a mesh, from the same weights; returns (state, metrics) in numpy."""
    draft = draft_step(given, mesh)
    placed = jax.device_put(start() if state is None else state, draft.shardings)
    vae = jax.device_put(vae_params(), jax.tree.map(lambda a: a.sharding, draft.vae))
    rows = global_batch(train_batch(given) if batch is None else batch, mesh)
    return jax.device_get(draft.step(placed, vae, rows))
