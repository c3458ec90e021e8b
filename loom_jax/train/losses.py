"""Losses as sums with counts, so that packing, micro-batches and hosts do not change the mean (DESIGN 5.7, spec 8)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loom_jax.data import Streams, Targets
from loom_jax.document import NO_TOKEN
from loom_jax.models import Constrain, LoomModel, unconstrained
from loom_jax.models.mot import Decoded
from loom_jax.nn import Attend, auto_attention, interpolate, training_timesteps, velocity_target
from loom_jax.train.cross_entropy import chunked_cross_entropy


class LossSums(NamedTuple):
    """Sums over a batch, float32 scalars. Divide after they were added up over micro-batches and devices."""

    ce: jax.Array
    """Cross-entropy of all labels."""
    ce_count: jax.Array
    ce_weighted: jax.Array
    """Cross-entropy times the weight of each label."""
    ce_weight: jax.Array
    mse: jax.Array
    """Squared velocity error of noisy tokens, averaged over channels."""
    mse_count: jax.Array


def velocity_error(prediction: jax.Array, clean: jax.Array, noise: jax.Array, noisy: jax.Array) -> jax.Array:
    """Returns (prediction - (noise - clean))^2, float32 [B, G, C]; 0 at tokens that are not `noisy` [B, G]."""
    return jnp.where(noisy[..., None], (prediction - velocity_target(clean, noise)) ** 2, 0.0)


def split_timesteps(shift: float, targets: Targets, normal: jax.Array) -> jax.Array:
    """Returns the timestep of every gen token, float32 [B, G]: shared by the tokens of a noise split, 0 for clean ones.

    Args:
      normal: float32 [B, N], a standard normal draw for each noise split of a row; N is at least their number.
    """
    split = targets.noise_split
    drawn = jnp.take_along_axis(normal, jnp.maximum(split, 0), axis=1)
    return jnp.where(split == NO_TOKEN, 0.0, training_timesteps(drawn, shift))


def training_forward(
    model: LoomModel,
    streams: Streams,
    clean: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    *,
    attend: Attend = auto_attention,
    constrain: Constrain = unconstrained,
    remat: str = "none",
    freeze_und: bool = False,
    return_layers: bool = False,
) -> Decoded:
    """Runs the model on the flow state of clean latents and noise [B, G, C] at timesteps [B, G] (0 for conditions)."""
    state = interpolate(clean, noise, timesteps)
    return model(
        streams,
        state,
        timesteps,
        attend=attend,
        constrain=constrain,
        remat=remat,
        freeze_und=freeze_und,
        return_layers=return_layers,
    )


def loss_sums(
    model: LoomModel,
    decoded: Decoded,
    targets: Targets,
    clean: jax.Array,
    noise: jax.Array,
    vocab_chunk: int = 16384,
) -> LossSums:
    """Returns the loss sums of a batch from its hidden states; `vocab_chunk` as in `chunked_cross_entropy`."""
    ce = chunked_cross_entropy(decoded.und, model.lm_head.kernel[...], targets.labels, vocab_chunk)
    noisy = targets.noise_split != NO_TOKEN
    mse = velocity_error(model.velocity(decoded.gen), clean, noise, noisy)
    return LossSums(
        ce=ce.sum(),
        ce_count=(targets.labels != NO_TOKEN).sum().astype(jnp.float32),
        ce_weighted=(ce * targets.label_weights).sum(),
        ce_weight=targets.label_weights.sum(),
        mse=mse.mean(-1).sum(),
        mse_count=noisy.sum().astype(jnp.float32),
    )


def mean_losses(sums: LossSums, reweight: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns (cross-entropy, mse) as global means; 0 for a modality that the batch does not have."""
    ce, ce_count = (sums.ce_weighted, sums.ce_weight) if reweight else (sums.ce, sums.ce_count)
    return _ratio(ce, ce_count), _ratio(sums.mse, sums.mse_count)


def _ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
