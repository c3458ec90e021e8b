"""Training: for now the losses and the forward pass that they are taken from."""

from loom_jax.train.losses import (
    LossSums,
    cross_entropy,
    loss_sums,
    mean_losses,
    split_timesteps,
    training_forward,
    velocity_error,
)

__all__ = [
    "LossSums",
    "cross_entropy",
    "loss_sums",
    "mean_losses",
    "split_timesteps",
    "training_forward",
    "velocity_error",
]
