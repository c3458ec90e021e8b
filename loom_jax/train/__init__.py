"""Training: configuration, state, losses, optimizer, the pure step, and the loop around it."""

from loom_jax.train.autoencoder import (
    AutoencoderTrainConfig,
    check_autoencoder,
    restore_autoencoder,
    train_autoencoder,
)
from loom_jax.train.config import (
    EmaConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SaveConfig,
    TrainConfig,
    WatchConfig,
)
from loom_jax.train.cross_entropy import chunked_cross_entropy, cross_entropy
from loom_jax.train.drift import DriftCheck, odd_copies
from loom_jax.train.flops import flop_coefficients, peak_tflops, training_flops
from loom_jax.train.goodput import Goodput
from loom_jax.train.held_out import HeldOut
from loom_jax.train.job import Draft, Job, build_job, draft_step
from loom_jax.train.latents import clean_latents, encode_canvas, sample_moments
from loom_jax.train.log import TrainLog
from loom_jax.train.loop import Hook, Hooks, train
from loom_jax.train.losses import (
    LossSums,
    loss_sums,
    mean_losses,
    split_timesteps,
    training_forward,
    velocity_error,
)
from loom_jax.train.optimizer import apply_updates, decay_mask, learning_rate, make_optimizer, round_stochastically
from loom_jax.train.replay import replay
from loom_jax.train.state import (
    ALWAYS_FROZEN,
    TrainState,
    init_state,
    parameter_names,
    split_model,
    trainable_filter,
    update_ema,
)
from loom_jax.train.step import Draws, Metrics, StepParts, batch_losses, draw, gradients, make_train_step
from loom_jax.train.watch import Watch

__all__ = [
    "ALWAYS_FROZEN",
    "AutoencoderTrainConfig",
    "Draft",
    "Draws",
    "DriftCheck",
    "EmaConfig",
    "Goodput",
    "HeldOut",
    "Hook",
    "Hooks",
    "Job",
    "LoraConfig",
    "LossConfig",
    "LossSums",
    "MeshConfig",
    "Metrics",
    "OptimizerConfig",
    "SaveConfig",
    "StepParts",
    "TrainConfig",
    "TrainLog",
    "TrainState",
    "Watch",
    "WatchConfig",
    "apply_updates",
    "batch_losses",
    "build_job",
    "check_autoencoder",
    "chunked_cross_entropy",
    "clean_latents",
    "cross_entropy",
    "decay_mask",
    "draft_step",
    "draw",
    "encode_canvas",
    "flop_coefficients",
    "gradients",
    "init_state",
    "learning_rate",
    "loss_sums",
    "make_optimizer",
    "make_train_step",
    "mean_losses",
    "odd_copies",
    "parameter_names",
    "peak_tflops",
    "replay",
    "restore_autoencoder",
    "round_stochastically",
    "sample_moments",
    "split_model",
    "split_timesteps",
    "train",
    "train_autoencoder",
    "trainable_filter",
    "training_flops",
    "training_forward",
    "update_ema",
    "velocity_error",
]
