"""Floating point operations of a training step, counted from shapes, and what chips can do at most."""

from __future__ import annotations

from loom_jax.core import DecoderConfig

PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40": 181.05,
    "L20": 119.5,
    "H20": 148.0,
    "MI300X": 1307.4,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}
"""Dense bfloat16 TFLOP/s by a part of the name that a device gives itself, from the makers' data sheets."""


def flop_coefficients(config: DecoderConfig) -> tuple[float, float]:
    """Returns (FLOPs per token, FLOPs per token and token of its document) of a forward and backward pass.

    A token goes through one expert; attention is counted without the saving of its mask. Source: spec section 9, MFU.
    """
    width, head = config.hidden_size, config.head_dim
    projections = width * head * (2 * config.num_heads + 2 * config.num_kv_heads)
    per_layer = 3 * width * config.intermediate_size + projections
    parameters = config.num_layers * per_layer + 2 * config.vocab_size * width
    return 6.0 * parameters, 12.0 * head * config.num_heads * config.num_layers


def training_flops(config: DecoderConfig, tokens: float, squared_lengths: float) -> float:
    """Returns the FLOPs of a step over `tokens` tokens whose documents' squared lengths add up to `squared_lengths`."""
    per_token, per_pair = flop_coefficients(config)
    return per_token * tokens + per_pair * squared_lengths


def peak_tflops(device_kind: str) -> float | None:
    """Returns the peak of a device in bfloat16 TFLOP/s, None for one that the table does not know, such as a CPU."""
    found = [name for name in PEAK_TFLOPS if name.lower() in device_kind.lower()]
    return PEAK_TFLOPS[max(found, key=len)] if found else None
