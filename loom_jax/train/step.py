"""One training step as a pure function of (state, batch): draws, forward, backward, update, moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loom_jax.data import Batch, TrainBatch
from loom_jax.document import NO_TOKEN
from loom_jax.models import Autoencoder, Constrain, LoomModel
from loom_jax.nn import Attend, Purpose, make_key
from loom_jax.train.config import TrainConfig
from loom_jax.train.latents import clean_latents
from loom_jax.train.losses import LossSums, loss_sums, split_timesteps, training_forward
from loom_jax.train.optimizer import apply_updates
from loom_jax.train.state import TrainState, update_ema


class Draws(NamedTuple):
    """What is random in a step: clean latents (posterior samples) and noise [B, G, C], timesteps [B, G]."""

    clean: jax.Array
    noise: jax.Array
    timesteps: jax.Array


class Metrics(NamedTuple):
    """What a step reports; float32 scalars unless said otherwise."""

    loss: jax.Array
    ce: jax.Array
    mse: jax.Array
    ce_count: jax.Array
    mse_count: jax.Array
    und_tokens: jax.Array
    gen_tokens: jax.Array
    squared_lengths: jax.Array
    """Sum over documents of their squared lengths, for counting FLOPs."""
    grad_norm: jax.Array
    """Before clipping."""
    learning_rate: jax.Array
    """Of this step, whether it was skipped or not."""
    finite: jax.Array
    """bool [P + 1]: whether the gradient of each trained parameter is finite, then whether the loss is."""
    skipped: jax.Array
    """int32: whether this step was skipped."""
    bad_steps: jax.Array
    """int32: skipped steps in a row, this one included."""


@dataclasses.dataclass(frozen=True)
class StepParts:
    """What a step is made of besides its arrays: structures, functions, settings."""

    graphdef: Any
    vae_graphdef: Any
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    config: TrainConfig
    attend: Attend
    constrain: Constrain


def draw(parts: StepParts, vae_params: Any, batch: TrainBatch, step: jax.Array) -> Draws:
    """Draws everything for a whole batch, before it is split: micro-batches do not change the numbers."""
    seed = parts.config.seed
    vae: Autoencoder = nnx.merge(parts.vae_graphdef, vae_params)
    clean = clean_latents(
        vae, batch, parts.config.model.latent_patch_size, make_key(seed, Purpose.POSTERIOR_NOISE, step)
    )
    noise = jax.random.normal(make_key(seed, Purpose.FLOW_NOISE, step), clean.shape, jnp.float32)
    # A row has at most as many noise splits as gen tokens.
    normal = jax.random.normal(make_key(seed, Purpose.TIMESTEP, step), clean.shape[:2], jnp.float32)
    return Draws(clean, noise, split_timesteps(parts.config.model.timestep_shift, batch.batch.targets, normal))


def batch_losses(parts: StepParts, trainable: Any, frozen: Any, batch: Batch, draws: Draws) -> LossSums:
    """Returns the loss sums of a batch."""
    config = parts.config
    model: LoomModel = nnx.merge(parts.graphdef, trainable, frozen)
    decoded = training_forward(
        model,
        batch.streams,
        *draws,
        attend=parts.attend,
        constrain=parts.constrain,
        remat=config.remat,
        freeze_und=config.freeze_und,
    )
    return loss_sums(model, decoded, batch.targets, draws.clean, draws.noise, config.loss.vocab_chunk)


def gradients(parts: StepParts, state: TrainState, batch: Batch, draws: Draws) -> tuple[Any, LossSums]:
    """Returns the gradient of the weighted mean losses and the loss sums, over all micro-batches.

    The denominators are those of the whole batch, so the parts add up to the same gradient whatever their number.
    """
    loss = parts.config.loss
    ce_count, mse_count = _counts(batch, loss.reweight)

    def objective(trainable: Any, part: tuple[Batch, Draws]) -> tuple[jax.Array, LossSums]:
        sums = batch_losses(parts, trainable, state.frozen, *part)
        ce = sums.ce_weighted if loss.reweight else sums.ce
        return loss.ce_weight * ce / ce_count + loss.mse_weight * sums.mse / mse_count, sums

    grad = jax.grad(objective, has_aux=True)
    count = parts.config.microbatches
    if count == 1:
        return grad(state.trainable, (batch, draws))
    split = jax.tree.map(lambda a: _split_rows(a, count, parts.constrain), (batch, draws))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grad(state.trainable, part)), None

    shapes = jax.eval_shape(grad, state.trainable, jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, split)[0]


def _split_rows(a: jax.Array, count: int, constrain: Constrain) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]; part i has rows i, i + count, ..., so that rows stay on their device."""
    a = jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1)
    return constrain(a, (None, "batch", *(None,) * (a.ndim - 2)))


def _counts(batch: Batch, reweight: bool) -> tuple[jax.Array, jax.Array]:
    """Denominators of the two losses, at least 1 where a modality is absent."""
    labels = batch.targets.label_weights.sum() if reweight else (batch.targets.labels != NO_TOKEN).sum()
    noisy = (batch.targets.noise_split != NO_TOKEN).sum()
    return tuple(jnp.where(n > 0, n, 1).astype(jnp.float32) for n in (labels, noisy))  # type: ignore[return-value]


def make_train_step(parts: StepParts) -> Callable[[TrainState, Any, TrainBatch], tuple[TrainState, Metrics]]:
    """Returns `step(state, vae_params, batch) -> (state, metrics)`, to be jitted with the state donated.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """

    def step(state: TrainState, vae_params: Any, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        draws = draw(parts, vae_params, batch, state.step)
        grads, sums = gradients(parts, state, batch.batch, draws)
        metrics = _measure(parts, batch.batch, grads, sums, state)
        good = metrics.skipped == 0

        def update() -> tuple[Any, Any, Any]:
            updates, optimizer = parts.optimizer.update(grads, state.optimizer, state.trainable)
            seed = parts.config.seed
            trainable = apply_updates(state.trainable, updates, make_key(seed, Purpose.ROUNDING, state.step))
            key = make_key(seed, Purpose.AVERAGE_ROUNDING, state.step)
            return trainable, optimizer, update_ema(state.ema, trainable, parts.config.ema.decay, key)

        def keep() -> tuple[Any, Any, Any]:
            return state.trainable, state.optimizer, state.ema

        trainable, optimizer, ema = jax.lax.cond(good, update, keep)
        return (
            TrainState(
                step=state.step + 1,
                trainable=trainable,
                frozen=state.frozen,
                ema=ema,
                optimizer=optimizer,
                bad_steps=metrics.bad_steps,
                skipped=state.skipped + metrics.skipped,
            ),
            metrics,
        )

    return step


def _measure(parts: StepParts, batch: Batch, grads: Any, sums: LossSums, state: TrainState) -> Metrics:
    loss = parts.config.loss
    ce_count, mse_count = _counts(batch, loss.reweight)
    ce = (sums.ce_weighted if loss.reweight else sums.ce) / ce_count
    mse = sums.mse / mse_count
    total = loss.ce_weight * ce + loss.mse_weight * mse
    squares = [jnp.sum(g.astype(jnp.float32) ** 2) for g in jax.tree.leaves(grads)]
    finite = jnp.isfinite(jnp.stack([*squares, total]))
    skipped = (~finite.all()).astype(jnp.int32)
    und, gen, squared = count_tokens(batch)
    return Metrics(
        loss=total,
        ce=ce,
        mse=mse,
        ce_count=sums.ce_count,
        mse_count=sums.mse_count,
        und_tokens=und,
        gen_tokens=gen,
        squared_lengths=squared,
        grad_norm=jnp.sqrt(sum(squares)),
        learning_rate=parts.learning_rate(state.step - state.skipped),
        finite=finite,
        skipped=skipped,
        bad_steps=jnp.where(skipped > 0, state.bad_steps + 1, 0),
    )


def count_tokens(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the und and gen tokens of a batch without filler, and the sum of squared document lengths, float32."""
    und, gen = batch.streams.und.document, batch.streams.gen.document
    both = jnp.concatenate([und, gen], axis=1)
    # Each token counts the tokens of its document: their sum over all tokens is that of the squared lengths.
    most = both.shape[1]
    sizes = jax.vmap(lambda d: jnp.bincount(jnp.where(d >= 0, d, most), length=most))(both)
    squared = (sizes.astype(jnp.float32) ** 2).sum()
    return (und >= 0).sum().astype(jnp.float32), (gen >= 0).sum().astype(jnp.float32), squared
