"""Training an autoencoder, for models whose pictures the published one does not fit, on one device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import loom_jax
from loom_jax.checkpoint import (
    AUTOENCODER_RECORD,
    WENT_ON,
    RunCheckpoints,
    autoencoder_origin,
    goes_on,
    restore_params,
    run_origin,
    save_params,
)
from loom_jax.core import AutoencoderConfig, CheckpointError, ConfigError, LoomError, from_mapping, to_mapping
from loom_jax.data import Pictures, PicturesConfig
from loom_jax.models import Autoencoder
from loom_jax.nn import Purpose, make_key
from loom_jax.parallel import PreemptionNotice
from loom_jax.train.config import EmaConfig, OptimizerConfig, SaveConfig
from loom_jax.train.latents import to_unit
from loom_jax.train.log import console, open_log
from loom_jax.train.optimizer import make_optimizer
from loom_jax.train.state import update_ema

WEIGHTS = "vae"
"""What a finished run leaves for `TrainConfig.vae_from` beside its record: the moving average of its weights."""


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainConfig:
    """A training job of an autoencoder.

    Attributes:
      vae: its sizes. With scale 1 and shift 0 latents come out near a standard normal distribution by themselves.
      pictures: what it learns from.
      kl_weight: of the mean divergence of a latent value from a standard normal one, beside the mean squared error of
        a pixel value in [-1, 1]. For a pixel noise of sigma it is 2 sigma^2 (latent values / pixel values).
      edge_weight: of the mean squared error of differences between neighbouring pixels: faint and fine patterns weigh
        little in the error of pixels alone.
      log_every: steps between lines of the log.
      init_from: folder of a finished run to begin with; without one it begins with nothing.
      keep_encoder: train the decoder alone, so that latents stay those that a model was trained on.
    """

    vae: AutoencoderConfig
    pictures: PicturesConfig
    total_steps: int
    seed: int = 42
    kl_weight: float = 4e-4
    edge_weight: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig(0.999)
    save: SaveConfig = SaveConfig()
    log_every: int = 20
    init_from: str | None = None
    keep_encoder: bool = False

    def __post_init__(self) -> None:
        if self.keep_encoder and self.init_from is None:
            raise ConfigError(
                "keep_encoder=True without init_from: there is no encoder to keep; add --config.init_from=DIR, the "
                "folder of a finished autoencoder"
            )
        if self.pictures.side % self.vae.downsample:
            raise ConfigError(
                f"pictures.side={self.pictures.side}: must be a multiple of {self.vae.downsample} for vae.ch_mult="
                f"{self.vae.ch_mult}"
            )
        if self.total_steps < 1 or self.log_every < 1 or min(self.kl_weight, self.edge_weight) < 0:
            raise ConfigError(
                f"total_steps={self.total_steps}, log_every={self.log_every}, kl_weight={self.kl_weight}, edge_weight="
                f"{self.edge_weight}: the first two must be at least 1, the others at least 0"
            )


class AutoencoderState(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    trainable: nnx.State
    ema: nnx.State | None
    optimizer: optax.OptState


def train_autoencoder(config: AutoencoderTrainConfig, workdir: Path, recipe: Sequence[str] = ()) -> AutoencoderState:
    """Trains until `config.total_steps`, going on where `workdir` stopped; returns the last state.

    A SIGTERM or Ctrl-C ends the run after the step at hand, with a checkpoint. `recipe` goes into the record of a new
    run, and into the checkpoints of one that goes on by another: the file that `config` was read from, and what was
    changed in it (`KEY=VALUE`).

    Raises:
      CheckpointError: `workdir` belongs to another run.
      LoomError: the loss is not finite, too many pictures cannot be read, or the disk is full.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: _build(config)), nnx.Param)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    if config.keep_encoder:
        optimizer = optax.partition({"encoder": optax.set_to_zero(), "decoder": optimizer}, _parts)

    def begin(params: nnx.State) -> AutoencoderState:
        average = jax.tree.map(jnp.copy, params) if config.ema.decay else None
        return AutoencoderState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))

    origin = run_origin(recipe, f"1 {jax.devices()[0].device_kind}")
    begun = _start(workdir, config, origin)
    checkpoints = RunCheckpoints(workdir, config.save.every, config.save.keep_last, config.save.keep_every)
    restored = checkpoints.restore(jax.eval_shape(begin, abstract))
    if restored is None:
        state, first, before = begin(_first(config, abstract)), 0, ()
    else:
        state, first, before = restored.state, restored.step, restored.meta.get(WENT_ON, ())
    remembered = {"total_steps": config.total_steps, WENT_ON: goes_on(before, begun, first, origin)}
    step_of = jax.jit(make_step(config, graphdef, optimizer), donate_argnums=0)
    log = open_log(workdir / "metrics.jsonl", first)
    with PreemptionNotice() as notice, contextlib.closing(Pictures(config.pictures)) as pictures, log, checkpoints:
        began = time.perf_counter()
        for step in range(first + 1, config.total_steps + 1):
            state, metrics = step_of(state, pictures[step])
            stop = step == config.total_steps or notice.agreed()
            if stop or step == 1 or step % config.log_every == 0:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise LoomError(f"the loss of step {step} is not finite: lower optimizer.learning_rate")
                line = {"step": step, **values, "seconds": round(time.perf_counter() - began, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                text = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
                console().print(text, highlight=False, soft_wrap=True)
            if stop or checkpoints.due(step):
                meta = {"preempted": step < config.total_steps and stop, **remembered}
                checkpoints.save(step, state, None, meta)
            checkpoints.check()
            if stop:
                text = f"stopped after step {step} of {config.total_steps}, with a checkpoint"
                console().print(text, highlight=False, soft_wrap=True)
                break
    if int(state.step) == config.total_steps:
        _finish(workdir, state)
    return state


def make_step(config: AutoencoderTrainConfig, graphdef: Any, optimizer: optax.GradientTransformation) -> Any:
    """Returns `step(state, pixels) -> (state, metrics)`; pixels are uint8 [N, H, W, 3]."""

    def losses(params: nnx.State, pixels: jax.Array, noise: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae: Autoencoder = nnx.merge(graphdef, params)
        moments = vae.encode(pixels)
        moments = jax.lax.stop_gradient(moments) if config.keep_encoder else moments
        error = vae.decode(vae.sample(moments, noise)) - pixels
        # Kingma and Welling, Auto-Encoding Variational Bayes (2014), appendix B.
        kl = 0.5 * (moments.mean**2 + jnp.exp(moments.logvar) - 1 - moments.logvar).mean()
        mse = (error**2).mean()
        edges = (jnp.diff(error, axis=1) ** 2).mean() + (jnp.diff(error, axis=2) ** 2).mean()
        metrics = {"mse": mse, "edges": edges, "kl": kl, "pixel_error": jnp.abs(error).mean() / 2}
        return mse + config.edge_weight * edges + config.kl_weight * kl, metrics

    def step(state: AutoencoderState, pixels: jax.Array) -> tuple[AutoencoderState, dict[str, jax.Array]]:
        pixels = to_unit(pixels)
        cells = tuple(side // config.vae.downsample for side in pixels.shape[1:3])
        key = make_key(config.seed, Purpose.POSTERIOR_NOISE, state.step)
        noise = jax.random.normal(key, (len(pixels), *cells, config.vae.z_channels), jnp.float32)
        (loss, metrics), grads = jax.value_and_grad(losses, has_aux=True)(state.trainable, pixels, noise)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        params: Any = optax.apply_updates(state.trainable, updates)  # type: ignore[arg-type]
        average = update_ema(state.ema, params, config.ema.decay, make_key(config.seed, Purpose.AVERAGE_ROUNDING))
        return AutoencoderState(state.step + 1, params, average, opt_state), {"loss": loss, **metrics}

    return step


def restore_autoencoder(path: Path, config: AutoencoderConfig, abstract: Any, shardings: Any = None) -> Any:
    """Restores the weights that a finished run left in its folder.

    Args:
      path: the run's folder.
      config: what they must be of.
      abstract, shardings: as in `restore_params`.

    Raises:
      CheckpointError: the run is not finished, or its autoencoder is another one.
    """
    check_autoencoder(path, config)
    return restore_params(path / WEIGHTS, abstract, shardings, dtype=jnp.float32)


def check_autoencoder(path: Path, config: AutoencoderConfig) -> Path:
    """Returns where a finished run left the weights of an autoencoder of these sizes.

    Raises:
      CheckpointError: the run is not finished, or its autoencoder is another one.
    """
    record = path / AUTOENCODER_RECORD
    if not record.is_file() or not (path / WEIGHTS).is_dir():
        raise CheckpointError(
            f"{path} holds no finished autoencoder ({AUTOENCODER_RECORD} and {WEIGHTS}/): train one with "
            "`loom train --config configs/world_autoencoder.py`"
        )
    found = from_mapping(AutoencoderConfig, json.loads(record.read_text(encoding="utf-8"))["config"]["vae"], "vae.")
    if found != config:
        raise CheckpointError(f"{path} holds an autoencoder of {found}, but model.vae is {config}: give its sizes")
    return path / WEIGHTS


def _build(config: AutoencoderTrainConfig) -> Autoencoder:
    return Autoencoder(config.vae, rngs=nnx.Rngs(params=make_key(config.seed, Purpose.INIT)))


def _first(config: AutoencoderTrainConfig, abstract: Any) -> Any:
    """Returns what the first step begins with."""
    if config.init_from is not None:
        return restore_autoencoder(Path(config.init_from), config.vae, abstract)
    return jax.jit(lambda: nnx.split(_build(config), nnx.Param)[1])()


def _parts(params: Any) -> Any:
    """Returns for each parameter of an autoencoder whether it is the encoder's or the decoder's."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def _start(workdir: Path, config: AutoencoderTrainConfig, origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """Writes the record of the run, or checks the one that is there; returns by what the run was begun."""
    record, mapping = workdir / AUTOENCODER_RECORD, to_mapping(config)
    if record.is_file():
        run = json.loads(record.read_text(encoding="utf-8"))
        found = run["config"]["vae"]
        if found != mapping["vae"]:
            raise CheckpointError(f"{workdir} is a run of another autoencoder ({found}): choose another folder")
        return run.get("origin", {})
    if config.init_from is not None:
        check_autoencoder(Path(config.init_from), config.vae)
        origin = {**origin, "init_from": autoencoder_origin(config.init_from)}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        content = {"created_by": f"loom_jax {loom_jax.__version__}", "config": mapping, "origin": origin}
        record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{workdir} cannot be made a run folder ({error}): choose another place") from error
    return origin


def _finish(workdir: Path, state: AutoencoderState) -> None:
    shutil.rmtree(workdir / WEIGHTS, ignore_errors=True)
    save_params(workdir / WEIGHTS, state.trainable if state.ema is None else state.ema)
